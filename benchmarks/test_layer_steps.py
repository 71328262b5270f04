"""One training step of one layer: each rule by each implementation, alternating."""

from costs import flops, minimum_bytes
from implementations import SUBJECT, TOLERANCE, check, first_run, largest_error, layer_step
from selection import DTYPES, RULES

from pyfeedback.testing import conv_inputs


def test_layer_step(race, selection, layer, rule_name, dtype_name):
    rule, dtype, device = RULES[rule_name], DTYPES[dtype_name], selection.device
    names = selection.implementations(rule)
    errors = check([name for name in names if name != "compiled"], layer, rule, dtype, device)
    batch, backward_only = selection.batch, selection.backward_only
    inputs = conv_inputs(layer, batch, dtype, device)
    steps = {name: layer_step(name, layer, rule, inputs) for name in names}
    info = {}
    if "compiled" in steps:
        info["not_compiled"] = first_run(steps["compiled"])
        if info["not_compiled"]:
            del steps["compiled"]
    gradients_agree({name: step for name, step in steps.items() if name != "plain"}, 2 * TOLERANCE[dtype])
    race(
        "layer",
        {name: step.step(backward_only) for name, step in steps.items()},
        group=layer.name,
        layer=layer.name,
        rule=rule_name,
        batch=batch,
        dtype=dtype_name,
        backward_only=backward_only,
        flops=flops(layer, rule, batch, backward_only),
        bytes=minimum_bytes(layer, rule, batch, dtype, backward_only),
        errors=errors,
        **info,
    )


def gradients_agree(steps, tolerance):
    """At the timed size, another algorithm may be chosen: its results must agree too."""
    mine = steps[SUBJECT].gradients()
    for name, step in steps.items():
        if name != SUBJECT:
            error = largest_error(step.gradients(), mine)
            assert error <= tolerance, f"{name} is {error:.1e} from {SUBJECT}"
