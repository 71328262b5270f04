"""The models of torchvision and timm in the zoo; see zoo.py."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from zoo_inputs import BATCH, CLASSES, Made, Positional, image, video

# torchvision


def torchvision(path: str, *arguments, size: int = 32, x: Callable = image, **options) -> Made:
    """A model by its path in torchvision.models."""
    module, _, name = f"torchvision.models.{path}".rpartition(".")
    return Positional(getattr(importlib.import_module(module), name)(*arguments, **options)), {"x": x(size)}


def thin(path: str, size: int, **options) -> Made:
    """AlexNet or VGG with 16 instead of 4096 units in their hidden linear layers."""
    model, inputs = torchvision(path, size=size, num_classes=CLASSES, **options)
    linear = [m for m in model.model.classifier if isinstance(m, nn.Linear)]
    widths = iter([nn.Linear(linear[0].in_features, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES)])
    model.model.classifier = nn.Sequential(*(next(widths) if m in linear else m for m in model.model.classifier))
    return model, inputs


def torchvision_resnet(block: str, **options) -> Made:
    resnet = importlib.import_module("torchvision.models.resnet")
    return torchvision("ResNet", getattr(resnet, block), [1, 1, 1, 1], num_classes=CLASSES, **options)


def torchvision_convnext() -> Made:
    setting = importlib.import_module("torchvision.models.convnext").CNBlockConfig
    return torchvision("ConvNeXt", [setting(16, 24, 1), setting(24, None, 1)], num_classes=CLASSES)


def torchvision_efficientnet(kind: str) -> Made:
    module = importlib.import_module("torchvision.models.efficientnet")
    first = {"MBConvConfig": module.MBConvConfig, "FusedMBConvConfig": module.FusedMBConvConfig}[kind]
    settings = [first(2, 3, 2, 8, 16, 1), module.MBConvConfig(2, 3, 2, 16, 24, 2)]
    if kind == "MBConvConfig":
        settings = [module.MBConvConfig(2, 3, 2, 8, 16, 1, 1.0, 1.0), module.MBConvConfig(2, 3, 2, 16, 24, 2, 1.0, 1.0)]
    return torchvision("EfficientNet", settings, 0.0, num_classes=CLASSES, last_channel=32)


def torchvision_mvit() -> Made:
    module = importlib.import_module("torchvision.models.video.mvit")
    blocks = [
        module.MSBlockConfig(1, 8, 16, [3, 3, 3], [1, 2, 2], [1, 1, 1], [1, 1, 1]),
        module.MSBlockConfig(2, 16, 16, [3, 3, 3], [1, 2, 2], [1, 2, 2], [1, 1, 1]),
    ]
    options = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True, "proj_after_attn": True}
    return torchvision("video.MViT", (32, 32), 8, blocks, num_classes=CLASSES, x=partial(video, 8), **options)


def detector(path: str, size: int = 64, **options) -> Made:
    """A detector in training, which computes its losses."""
    model, _ = torchvision(path, weights=None, weights_backbone=None, num_classes=CLASSES, **options)
    boxes = torch.tensor([[5.0, 5.0, 40.0, 40.0], [10.0, 20.0, 50.0, 60.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in range(BATCH)]
    return model.model, {"images": image(size), "targets": targets}


def torchvision_models() -> dict[str, Callable[[], Made]]:
    swin = {"embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2], "num_classes": CLASSES}
    backbone = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
    named = {"num_classes": CLASSES}
    v2 = "SwinTransformerBlockV2", "PatchMergingV2"
    found = {
        "alexnet": partial(thin, "alexnet", 64),
        "vgg11": partial(thin, "vgg11", 32),
        "vgg11_bn": partial(thin, "vgg11_bn", 32),
        "resnet (basic)": partial(torchvision_resnet, "BasicBlock"),
        "resnet (bottleneck)": partial(torchvision_resnet, "Bottleneck"),
        "resnext": partial(torchvision_resnet, "Bottleneck", groups=32, width_per_group=4),
        "densenet": partial(torchvision, "DenseNet", 8, (2, 2, 2), 16, **named),
        "googlenet": partial(torchvision, "googlenet", size=64, aux_logits=True, init_weights=False, **named),
        "inception_v3": partial(torchvision, "inception_v3", size=80, aux_logits=False, init_weights=False, **named),
        "squeezenet1_1": partial(torchvision, "squeezenet1_1", **named),
        "mobilenet_v2": partial(torchvision, "mobilenet_v2", width_mult=0.35, **named),
        "mobilenet_v3_small": partial(torchvision, "mobilenet_v3_small", **named),
        "mnasnet0_5": partial(torchvision, "mnasnet0_5", **named),
        "shufflenet_v2_x0_5": partial(torchvision, "shufflenet_v2_x0_5", **named),
        "regnet_y_400mf": partial(torchvision, "regnet_y_400mf", **named),
        "efficientnet": partial(torchvision_efficientnet, "MBConvConfig"),
        "efficientnet_v2": partial(torchvision_efficientnet, "FusedMBConvConfig"),
        "convnext": torchvision_convnext,
        "vit": partial(torchvision, "VisionTransformer", 32, 8, 2, 2, 16, 24, **named),
        "swin": partial(torchvision, "SwinTransformer", [4, 4], window_size=[4, 4], **swin),
        "swin_v2": partial(torchvision_swin_v2, swin, *v2),
        "maxvit": partial(torchvision, "MaxVit", (64, 64), 8, 2, [8, 16], [1, 1], 8, 0.0, size=64, num_classes=CLASSES),
        "fcn_resnet50": partial(torchvision_segmenter, "segmentation.fcn_resnet50", **backbone),
        "deeplabv3_mobilenet_v3_large": partial(
            torchvision_segmenter, "segmentation.deeplabv3_mobilenet_v3_large", **backbone
        ),
        "lraspp_mobilenet_v3_large": partial(
            torchvision_segmenter, "segmentation.lraspp_mobilenet_v3_large", **backbone
        ),
        "r3d_18": partial(torchvision, "video.r3d_18", x=partial(video, 4), **named),
        "r2plus1d_18": partial(torchvision, "video.r2plus1d_18", x=partial(video, 4), **named),
        "swin3d": partial(
            torchvision, "video.SwinTransformer3d", [2, 4, 4], window_size=[2, 4, 4], x=partial(video, 4), **swin
        ),
        "mvit": torchvision_mvit,
        "raft_small": torchvision_raft,
        "fasterrcnn_mobilenet_v3": partial(detector, "detection.fasterrcnn_mobilenet_v3_large_320_fpn", min_size=64),
        "ssdlite320_mobilenet_v3": partial(detector, "detection.ssdlite320_mobilenet_v3_large", size=96),
    }
    return {f"torchvision.{name}": make for name, make in found.items()}


def torchvision_swin_v2(options: dict[str, Any], block: str, merging: str) -> Made:
    module = importlib.import_module("torchvision.models.swin_transformer")
    return torchvision(
        "SwinTransformer", [4, 4], window_size=[4, 4], block=getattr(module, block),
        downsample_layer=getattr(module, merging), **options,
    )  # fmt: skip


def torchvision_segmenter(path: str, **options) -> Made:
    return torchvision(path, size=64, **options)


def torchvision_raft() -> Made:
    model = importlib.import_module("torchvision.models.optical_flow").raft_small(weights=None)
    return model, {"image1": image(128)[:1], "image2": image(128)[:1], "num_flow_updates": 2}


# timm

TIMM: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "botnet26t_256": {"img_size": 64, "width_factor": 0.25},
    "cait_xxs24_224": {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "coat_lite_tiny": {"img_size": 32, "embed_dims": [16, 16, 32, 32], "serial_depths": [1, 1, 1, 1]},
    "coatnet_pico_rw_224": {
        "img_size": 64, "embed_dim": (16, 32, 32, 64), "depths": (1, 1, 1, 1), "stem_width": (8, 16),
    },
    "convit_tiny": {
        "img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "local_up_to_layer": 1,
    },
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "convnextv2_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32), "num_heads": (1, 1, 2, 2)},
    "deit3_small_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "densenet121": {"growth_rate": 8, "block_config": (2, 2, 2, 2)},
    "dm_nfnet_f0": {"depths": (1, 1, 1, 1), "channels": (16, 16, 32, 32), "group_size": 8},
    "eca_nfnet_l0": {"depths": (1, 1, 1, 1), "channels": (16, 16, 32, 32), "group_size": 8},
    "edgenext_xx_small": {},
    "efficientformer_l1": {"size": 224, "depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 32)},
    "efficientformerv2_s0": {"img_size": 64, "depths": (1, 1, 1, 2), "embed_dims": (8, 16, 16, 32)},
    "efficientnet_b0": {},
    "efficientvit_b0": {"size": 64},
    "efficientvit_m0": {"img_size": 64},
    "ese_vovnet19b_dw": {},
    "eva02_tiny_patch14_224": {"img_size": 28, "embed_dim": 24, "depth": 2, "num_heads": 2},
    "eva_giant_patch14_224": {"img_size": 28, "embed_dim": 24, "depth": 2, "num_heads": 2},
    "fastvit_t8": {"size": 64, "layers": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 32)},
    "ghostnet_050": {},
    "hgnetv2_b0": {},
    "hiera_tiny_224": {"img_size": 64, "embed_dim": 16, "stages": (1, 1, 1, 1)},
    "inception_next_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "lambda_resnet26t": {"img_size": 64, "width_factor": 0.25},
    "levit_128s": {"img_size": 64},
    "maxvit_rmlp_pico_rw_256": {"img_size": 64, "embed_dim": (32, 32, 32, 32), "depths": (1, 1, 1, 1), "stem_width": 8},
    "mixnet_s": {},
    "mobilenetv4_conv_small": {},
    "mobileone_s0": {},
    "mobilevit_xxs": {"size": 64},
    "mobilevitv2_050": {"size": 64},
    "nf_resnet26": {"depths": (1, 1, 1, 1), "channels": (16, 16, 32, 32)},
    "pit_ti_224": {"img_size": 64},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "regnetx_002": {},
    "repvgg_a0": {},
    "repvit_m0_9": {},
    "res2net50_26w_4s": {"layers": (1, 1, 1, 1)},
    "resnet18": {"layers": (1, 1, 1, 1)},
    "resnetv2_50": {"layers": (1, 1, 1, 1)},
    "rexnet_100": {},
    "sequencer2d_s": {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 16, 16), "hidden_sizes": (8, 8, 8, 8)},
    "skresnet18": {"layers": (1, 1, 1, 1)},
    "starnet_s1": {"depths": (1, 1, 1, 1), "base_dim": 8},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2),
    },
    "swinv2_cr_tiny_224": {"img_size": 64, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)},
    "swinv2_tiny_window8_256": {
        "img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2),
    },
    "tf_efficientnet_b0": {},
    "tiny_vit_5m_224": {
        "size": 64, "depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32), "num_heads": (1, 2, 2, 2),
    },
    "tnt_s_patch16_224": {"img_size": 32, "embed_dim": 16, "inner_dim": 8, "depth": 2, "num_heads_outer": 2},
    "twins_svt_small": {
        "img_size": 64, "depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32), "num_heads": (1, 1, 2, 2),
    },
    "vit_relpos_small_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "visformer_tiny": {"img_size": 64, "embed_dim": 48, "depth": (1, 1, 1), "num_heads": 2},
    "xcit_nano_12_p16_224": {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2},
}  # fmt: skip


# Where the functions of timm do not take a smaller size, the class: its module, the size of the image, and the model
TIMM_CLASSES: dict[str, tuple[str, int, Callable[[Any], nn.Module]]] = {
    "caformer": ("metaformer", 32, lambda m: m.MetaFormer(
        depths=(1, 1), dims=(8, 32), token_mixers=[m.SepConv, m.Attention], num_classes=CLASSES,
        norm_layers=[m.LayerNorm2dNoBias, m.LayerNormNoBias])),
    "convmixer": ("convmixer", 32, lambda m: m.ConvMixer(16, 2, num_classes=CLASSES)),
    "crossvit": ("crossvit", 48, lambda m: m.CrossVit(
        48, (1.0, 1.0), (12, 16), num_classes=CLASSES, embed_dim=(8, 16), num_heads=(2, 2), depth=((1, 1, 0),))),
    "focalnet": ("focalnet", 32, lambda m: m.FocalNet(depths=(1, 1), embed_dim=8, num_classes=CLASSES)),
    "gcvit": ("gcvit", 64, lambda m: m.GlobalContextVit(
        img_size=64, depths=(1, 2), num_heads=(1, 2), embed_dim=8, window_ratio=(16, 16), num_classes=CLASSES)),
    "gmlp": ("mlp_mixer", 32, lambda m: m.MlpMixer(
        CLASSES, 32, patch_size=8, num_blocks=2, embed_dim=16, mlp_ratio=6,
        block_layer=m.SpatialGatingBlock, mlp_layer=m.GatedMlp)),
    "mixer": ("mlp_mixer", 32, lambda m: m.MlpMixer(CLASSES, 32, patch_size=8, num_blocks=2, embed_dim=16)),
    "mvitv2": ("mvitv2", 32, lambda m: m.MultiScaleVit(m.MultiScaleVitCfg(
        depths=(1, 2), embed_dim=8, stride_q=((1, 1), (2, 2))), img_size=(32, 32), num_classes=CLASSES)),
    "nest": ("nest", 32, lambda m: m.Nest(
        img_size=32, embed_dims=(8, 16, 16), num_heads=(1, 2, 2), depths=(1, 1, 1), num_classes=CLASSES)),
    "poolformer": ("metaformer", 32, lambda m: m.MetaFormer(
        depths=(1, 1), dims=(8, 16), downsample_norm=None, mlp_bias=True, norm_layers=m.GroupNorm1,
        res_scale_init_values=None, use_mlp_head=False, num_classes=CLASSES)),
    "resmlp": ("mlp_mixer", 32, lambda m: m.MlpMixer(
        CLASSES, 32, patch_size=8, num_blocks=2, embed_dim=16, mlp_ratio=4,
        block_layer=m.ResBlock, norm_layer=m.Affine)),
    "resnetv2 (bit)": ("resnetv2", 32, lambda m: m.ResNetV2(
        [1, 1], channels=(128, 256), conv_layer=m.StdConv2d, num_classes=CLASSES, stem_type="fixed", stem_chs=32)),
    "volo": ("volo", 64, lambda m: m.VOLO(
        (1, 1), 64, num_classes=CLASSES, embed_dims=(16, 16), num_heads=(2, 2), downsamples=(True, False),
        outlook_attention=(True, False), mlp_ratio=(2, 2))),
}  # fmt: skip


def timm_class(module: str, size: int, make: Callable[[Any], nn.Module]) -> Made:
    return Positional(make(importlib.import_module(f"timm.models.{module}"))), {"x": image(size)}


def timm_model(name: str, size: int = 0, **options) -> Made:
    create = importlib.import_module("timm").create_model
    return Positional(create(name, num_classes=CLASSES, **options)), {"x": image(size or options.get("img_size", 32))}


def vision_models() -> dict[str, Callable[[], Made]]:
    """The models by name."""
    found = {name: partial(timm_model, name, **options) for name, options in TIMM.items()}
    found |= {name: partial(timm_class, *row) for name, row in TIMM_CLASSES.items()}
    return {f"timm.{name}": found[name] for name in sorted(found)} | torchvision_models()
