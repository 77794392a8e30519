"""Networks to recalibrate, and images with something to learn in them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from numpy.typing import NDArray

CLASSES = 10
# These scale images themselves.
RESCALING = ("MobileNetV3", "EfficientNet")


def mlp(size: int) -> keras.Model:
    """Six dense layers of 128, each with BN."""
    stack: list[Any] = [keras.Input((size, size, 3)), keras.layers.Flatten()]
    for _ in range(6):
        stack += [
            keras.layers.Dense(128),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
        ]
    return keras.Sequential([*stack, keras.layers.Dense(CLASSES)])


def plain(size: int) -> keras.Model:
    """Sixteen convolutions of 32 filters, each with BN; no short cuts."""
    stack: list[Any] = [keras.Input((size, size, 3))]
    for index in range(16):
        stack += [
            keras.layers.Conv2D(
                32, 3, 2 if index in (1, 6) else 1, "same", use_bias=False
            ),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
        ]
    stack += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(CLASSES)]
    return keras.Sequential(stack)


def application(name: str) -> Callable[[int], keras.Model]:
    """A network of `keras.applications`."""

    def build(size: int) -> keras.Model:
        return getattr(keras.applications, name)(
            weights=None,
            input_shape=(size, size, 3),
            classes=CLASSES,
            classifier_activation=None,
        )

    return build


class Network(NamedTuple):
    """A network to train.

    Args:
        build: Makes it for images of a size.
        size: Width and height of the images.
        images: How many there are.
        steps: Steps of training, at most.
    """

    build: Callable[[int], keras.Model]
    size: int = 32
    images: int = 1024
    steps: int = 30


# The smallest images that each takes; fewer of the larger ones.
NETWORKS = {
    "mlp6": Network(mlp, images=4096, steps=200),
    "plain16": Network(plain, images=4096, steps=60),
    "mlp6-40k": Network(mlp, images=40_000, steps=200),
    "plain16-20k": Network(plain, images=20_000, steps=60),
    "MobileNet": Network(application("MobileNet")),
    "MobileNetV2": Network(application("MobileNetV2"), images=4096),
    "MobileNetV3Large": Network(application("MobileNetV3Large")),
    "ResNet50": Network(application("ResNet50")),
    "ResNet50-128": Network(application("ResNet50"), 96, 128, 10),
    "ResNet50V2": Network(application("ResNet50V2")),
    "DenseNet121": Network(application("DenseNet121")),
    "NASNetMobile": Network(application("NASNetMobile")),
    "EfficientNetB0": Network(application("EfficientNetB0")),
    "EfficientNetV2B0": Network(application("EfficientNetV2B0")),
    "Xception": Network(application("Xception"), 71, 256, 10),
    "InceptionV3": Network(application("InceptionV3"), 75, 256, 10),
    "InceptionResNetV2": Network(application("InceptionResNetV2"), 75, 128, 5),
}


def images(
    count: int, size: int, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Images of ten smooth patterns, moved about, of various contrast, with noise.

    Returns:
        Images `(count, size, size, 3)` between 0 and 255, and their classes.
    """
    draw = np.random.default_rng(seed)
    place = 2 * np.pi * np.arange(size) / size
    waves = np.stack([np.cos(place), np.sin(place), np.cos(2 * place)])
    weights = draw.normal(size=(CLASSES, 3, 3, 3))
    patterns = np.einsum("nijc,ix,jy->nxyc", weights, waves, waves)
    classes = draw.integers(0, CLASSES, count).astype("int32")
    x = np.empty((count, size, size, 3), "float32")
    for index, each in enumerate(classes):
        moved = np.roll(patterns[each], draw.integers(0, size, 2), axis=(0, 1))
        light = draw.uniform(80, 180) + draw.uniform(10, 40) * moved
        x[index] = light + draw.normal(0, 10, moved.shape)
    return np.clip(x, 0, 255), classes


def data_for(name: str, count: int, size: int) -> tuple[Any, Any]:
    """Images as the network takes them: between 0 and 255, or between −1 and 1."""
    x, y = images(count, size)
    return (x if name.startswith(RESCALING) else x / 127.5 - 1), y


def trained(
    name: str, network: Network, steps: int | None = None
) -> tuple[keras.Model, NDArray[np.float32]]:
    """The network after a short training, and the images of it."""
    keras.utils.set_random_seed(0)
    x, y = data_for(name, network.images, network.size)
    model = network.build(network.size)
    model.compile(
        keras.optimizers.Adam(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    wanted = network.steps if steps is None else steps
    draw = np.random.default_rng(1)
    for _ in range(wanted):
        chosen = draw.integers(0, len(x), 32)
        model.train_on_batch(x[chosen], y[chosen])
    return model, x
