"""The contestants of training: whole steps (forward, loss, backward, batch norm and optimizer) of B0 in four libraries.

    python -m tests.bench.steps NAME --size 32 --batch 128 [--gpu]

Each is given its better form, and does no more than ours: RMSProp with momentum 0.9, dropout and stochastic depth of 0.2, batch
norm over the whole batch, weight decay, and label smoothing where the library has it. Ours also keeps the moving average of the
weights. Images are on the device before the clock starts. On CPU all are float32; on a GPU the convolutions are bfloat16.
"""

import argparse
import importlib.metadata
import os
import subprocess
import time
from collections.abc import Callable

from .contestant import serve

CLASSES = 1000
LEARNING_RATE = 1e-3
Run = Callable[[int], None]  # does so many steps, and waits until they are done


def effnetlib(size: int, batch: int, gpu: bool) -> Run:
    from effnetlib import Recipe

    from .ours import Training

    precision = "bfloat16" if gpu else "float32"
    recipe = Recipe.preset(f"b0-{batch}-rmsprop").replace(
        image_size=size, batch_norm_batch_size=batch, precision=precision
    )
    return Training(recipe, devices=1).run


def pytorch(size: int, batch: int, gpu: bool) -> Run:
    from efficientnet_pytorch import EfficientNet

    # The size makes its padding static, which is faster.
    model = EfficientNet.from_name("efficientnet-b0", image_size=size, num_classes=CLASSES)
    return _torch_run(model, size, batch, gpu, compiled=False)


def timm(size: int, batch: int, gpu: bool) -> Run:
    import torch

    if torch.version.cuda is None:
        # Nothing in timm's networks needs torchvision's operators; but in a torch without CUDA they do not load, and
        # torchvision then stumbles over two names.
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from timm import create_model

    model = create_model("efficientnet_b0", num_classes=CLASSES, drop_rate=0.2, drop_path_rate=0.2)
    return _torch_run(model, size, batch, gpu, compiled=gpu)


def _torch_run(model, size, batch, gpu, compiled) -> Run:
    import torch

    torch.set_num_threads(os.cpu_count())
    device = torch.device("cuda" if gpu else "cpu")
    model = model.to(device, memory_format=torch.channels_last).train()
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.RMSprop(
        model.parameters(), lr=LEARNING_RATE, alpha=0.9, eps=1e-3, momentum=0.9, weight_decay=1e-5
    )
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    images = torch.randn(batch, 3, size, size).to(device, memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (batch,)).to(device)

    def run(steps):
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
                loss = criterion(forward(images), labels)
            loss.backward()
            optimizer.step()
        loss.item()

    return run


def keras(size: int, batch: int, gpu: bool) -> Run:
    os.environ["KERAS_BACKEND"] = "jax"
    import jax
    from keras import applications, losses, optimizers

    if gpu:
        raise SystemExit("Keras is measured on CPU only")
    model = applications.EfficientNetB0(
        weights=None, classes=CLASSES, input_shape=(size, size, 3), classifier_activation=None
    )
    model.compile(
        optimizer=optimizers.RMSprop(LEARNING_RATE, rho=0.9, momentum=0.9, epsilon=1e-3, weight_decay=1e-5),
        loss=losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    images = jax.random.uniform(jax.random.key(0), (batch, size, size, 3), maxval=255.0)
    labels = jax.random.randint(jax.random.key(1), (batch,), 0, CLASSES)

    def run(steps):
        for _ in range(steps):
            model.train_on_batch(images, labels)  # waits for the loss

    return run


def images_per_second(run: Run, steps: int, batch: int) -> float:
    start = time.perf_counter()
    run(steps)
    return steps * batch / (time.perf_counter() - start)


LIBRARIES = {"effnetlib": effnetlib, "pytorch": pytorch, "timm": timm, "keras": keras}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "efficientnet-pytorch", "timm", "keras", "numpy")


def _versions() -> dict:
    installed = {
        each.metadata["Name"].replace("_", "-").lower(): each.version for each in importlib.metadata.distributions()
    }
    return {name: installed[name] for name in PACKAGES if name in installed}


def _device(gpu: bool) -> str:
    if not gpu:
        return "CPU"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("--size", type=int, required=True, help="pixels a side")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args()

    def prepare():
        run = LIBRARIES[options.library](options.size, options.batch, options.gpu)
        run(2)
        rate = images_per_second(run, 2, options.batch)
        facts = {"versions": _versions(), "device": _device(options.gpu), "step_seconds": options.batch / rate}

        def do_round(steps):
            run(1)  # finds the caches as the other side has left them
            return images_per_second(run, steps, options.batch)

        return facts, do_round

    serve(prepare)


if __name__ == "__main__":
    main()
