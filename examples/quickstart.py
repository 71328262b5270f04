"""Train a small network on handwritten digits without weight transport, and print how far its feedback aligned."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import pyfeedback

torch.manual_seed(0)
digits = load_digits()  # shipped with scikit-learn: nothing is downloaded
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8], ink from 0 to 1
labels, (train, test) = torch.tensor(digits.target), torch.randperm(len(images)).split([1400, 397])

model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, 10))
pyfeedback.convert(model, pyfeedback.rule("kp", decay=0.01))  # errors go back through a random B per layer
optimizer = pyfeedback.optim.SGD(model, lr=0.05, momentum=0.9, weight_decay=0.01)  # equal decays: B converges to W
for _ in range(20):  # epochs: a converted model trains like any other
    for batch in train[torch.randperm(len(train))].split(50):
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step(), optimizer.zero_grad()

print(f"test accuracy: {(model(images[test]).argmax(1) == labels[test]).float().mean():.1%}")
for name, layer in pyfeedback.alignment(model).items():
    print(f"layer {name}: {layer.angle:.1f} degrees between B and W")  # about 90 before training
