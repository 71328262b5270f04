"""What the tests with the Trainer of Lightning share."""

from torch.nn import functional as F


def classifier(lightning, network, optimizer_of):
    """A module that trains ``network`` with the optimizer that ``optimizer_of(module)`` returns."""

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network

        def training_step(self, batch, index):
            x, target = batch
            return F.cross_entropy(self.network(x), target)

        def configure_optimizers(self):
            return optimizer_of(self)

    return Classifier()
