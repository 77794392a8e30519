"""Speech enhancement: a validation loss that is high and jumps, and what cures it.

A network sees 7 frames of the log spectrum of noisy speech, 257 bins each, and predicts
the clean frame in their middle: three Dense + BatchNormalization + ReLU layers, mean
squared error. The same training is run five times; only the batches, the momentum, or
BatchNormalization itself differ. Then the run in which the question was asked is cured
in each way that is on offer.

    python docs/examples/speech.py                    # Debian's recordings
    python docs/examples/speech.py --wav DIRECTORY    # yours: 16 bit PCM

By default it reads the recordings of Debian's package asterisk-core-sounds-en-wav
(`apt-get install asterisk-core-sounds-en-wav`), which are at 8 kHz.
"""

import argparse
import sys
import textwrap
import warnings
import wave
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import bn_callbacks as bn
from bn_callbacks.statistics.moving_average import debias, new_weight, start_weight

RECORDINGS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
PACKAGE = "asterisk-core-sounds-en-wav"
FFT, HOP, CONTEXT = 512, 256, 7
BINS = FFT // 2 + 1
UNITS = 256
SHUFFLED_BATCH = 64
INDENT = {"initial_indent": "  advice    ", "subsequent_indent": " " * 12}


@dataclass(frozen=True)
class Frames:
    """Frames of several utterances, one after the other.

    Args:
        x: Noisy context, `CONTEXT * BINS` values a frame.
        y: Clean spectrum, `BINS` values a frame.
        ends: Where each utterance ends.
    """

    x: np.ndarray
    y: np.ndarray
    ends: np.ndarray


def read(directory, limit):
    """Samples of the WAV files under a directory, at most `limit` of them."""
    found = []
    for path in sorted(directory.rglob("*.wav")):
        try:
            with wave.open(str(path)) as file:
                channels, width = file.getnchannels(), file.getsampwidth()
                content = file.readframes(file.getnframes())
        except (wave.Error, EOFError):
            continue
        if width == 2:
            samples = np.frombuffer(content, "<i2").reshape(-1, channels).mean(axis=1)
            if len(samples) >= FFT + CONTEXT * HOP and samples.any():
                found.append(samples / 32768)
    if len(found) < 10:
        sys.exit(
            f"At least 10 WAV files of 16 bit PCM are needed. Received: {len(found)} "
            f"in {directory}. Install Debian's package {PACKAGE}, or name another "
            "directory with --wav."
        )
    order = np.random.default_rng(0).permutation(len(found))
    return [found[i] for i in order[:limit]]


def log_spectrum(samples):
    """The log power spectrum, a row of `BINS` values for each frame."""
    starts = np.arange(0, len(samples) - FFT + 1, HOP)
    frames = samples[starts[:, None] + np.arange(FFT)] * np.hanning(FFT)
    return np.log(np.abs(np.fft.rfft(frames)) ** 2 + 1e-6)


def with_noise(samples, rng):
    """Speech in white noise, at a ratio drawn anew for each utterance."""
    ratio = 10 ** (rng.uniform(-5, 20) / 10)
    noise = rng.normal(size=len(samples))
    return samples + noise * np.sqrt(np.mean(samples**2) / ratio)


def make_frames(utterances, rng, scale=None):
    """Inputs and targets, standardised by `scale` or else by their own statistics."""
    noisy = [log_spectrum(with_noise(samples, rng)) for samples in utterances]
    clean = [log_spectrum(samples) for samples in utterances]
    if scale is None:
        rows = np.concatenate(noisy), np.concatenate(clean)
        scale = [(each.mean(axis=0), each.std(axis=0)) for each in rows]
    (x_mean, x_std), (y_mean, y_std) = scale
    half = CONTEXT // 2
    contexts = []
    for spectrum in noisy:
        padded = np.pad((spectrum - x_mean) / x_std, ((half, half), (0, 0)), "edge")
        picks = np.arange(len(spectrum))[:, None] + np.arange(CONTEXT)
        contexts.append(padded[picks].reshape(len(spectrum), -1))
    frames = Frames(
        np.concatenate(contexts).astype("float32"),
        ((np.concatenate(clean) - y_mean) / y_std).astype("float32"),
        np.cumsum([len(spectrum) for spectrum in clean]),
    )
    return frames, scale


def utterance_batches(frames):
    """A dataset with one utterance a batch, in a new order each epoch."""
    x, y = tf.constant(frames.x), tf.constant(frames.y)
    spans = tf.data.Dataset.from_tensor_slices(([0, *frames.ends[:-1]], frames.ends))
    spans = spans.shuffle(len(frames.ends), seed=0)
    return spans.map(lambda start, end: (x[start:end], y[start:end]))


def frame_batches(frames):
    """A dataset whose batches are frames of all utterances, shuffled."""
    data = tf.data.Dataset.from_tensor_slices((frames.x, frames.y))
    return data.shuffle(len(frames.x), seed=0).batch(SHUFFLED_BATCH)


def make_model(momentum):
    """The network; `momentum=None` leaves BatchNormalization out."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((CONTEXT * BINS,))])
    for number in (1, 2, 3):
        model.add(keras.layers.Dense(UNITS))
        if momentum is not None:
            name = f"bn_{number}"
            model.add(keras.layers.BatchNormalization(momentum=momentum, name=name))
        model.add(keras.layers.ReLU())
    model.add(keras.layers.Dense(BINS))
    # Each utterance has a length of its own, and XLA would compile anew for each.
    model.compile(keras.optimizers.Adam(0.001), "mse", jit_compile=False)
    return model


def train(name, momentum, batches, probe, validation, epochs):
    """Trains under the monitor, prints what it says, and returns the model."""
    model = make_model(momentum)
    monitor = bn.BatchNormMonitor(probe=probe)
    with warnings.catch_warnings():
        # The report says the same; with several runs that is easier to read.
        warnings.simplefilter("ignore", bn.BatchNormWarning)
        history = model.fit(
            batches,
            epochs=epochs,
            validation_data=(validation.x, validation.y),
            validation_batch_size=256,
            callbacks=[monitor] if momentum is not None else [],
            shuffle=False,  # the datasets are
            verbose=0,
        ).history
    print(f"\n{name}")
    print(f"  loss      {_row(history['loss'])}")
    print(f"  val_loss  {_row(history['val_loss'])}")
    if momentum is not None:
        report = monitor.report
        verdicts = [f"{each.path}: {each.cause}" for each in report.layers]
        print(f"  verdict   {', '.join(verdicts)} (loss gap {report.loss_gap:.3g})")
        if report.lagging:
            print(textwrap.fill(report.lagging[0].advice, 88, **INDENT))
    return model, history["val_loss"][-1]


def _row(values):
    return " ".join(f"{value:8.3f}" for value in values)


def debiased(model, momentum, steps):
    """Takes the start values 0 and 1 out of the moving statistics."""
    weight = start_weight(momentum, steps)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.moving_mean.assign(debias(layer.moving_mean.numpy(), 0, weight))
            layer.moving_variance.assign(
                debias(layer.moving_variance.numpy(), 1, weight)
            )


def cure(name, model, momentum, training, validation, epochs):
    """Prints the validation loss after each cure; the weights stay as they are."""

    def loss():
        return model.evaluate(validation.x, validation.y, batch_size=256, verbose=0)

    batches = utterance_batches(training)
    figures = {"as trained": loss()}
    before = model.get_weights()
    debiased(model, momentum, epochs * len(training.ends))
    figures["debiased"] = loss()
    model.set_weights(before)
    for kind, data in (("utterances", batches), ("shuffled", frame_batches(training))):
        for label, refine in (("one pass", 0), ("refined", "auto")):
            with bn.recalibrated(model, data, refine=refine, verbose=0):
                figures[f"{label}, {kind}"] = loss()
    print(f"\n{name}, validation loss")
    for label, value in figures.items():
        print(f"  {label:22}{value:8.3f}")
    return figures["refined, utterances"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wav", type=Path, default=RECORDINGS, help="directory")
    parser.add_argument("--utterances", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    utterances = read(arguments.wav, arguments.utterances)
    held_out = len(utterances) // 5
    rng = np.random.default_rng(1)
    training, scale = make_frames(utterances[held_out:], rng)
    validation, _ = make_frames(utterances[:held_out], rng, scale)
    steps = arguments.epochs * len(training.ends)
    print(
        f"{len(training.ends)} utterances ({len(training.x):,} frames) for training, "
        f"{len(validation.ends)} ({len(validation.x):,}) for validation;\n"
        f"a loss of 1 is that of predicting the mean. {steps:,} steps of one utterance."
    )
    # A probe is in the order of training: whole utterances, or shuffled frames.
    end = training.ends[min(9, len(training.ends) - 1)]
    some = rng.choice(len(training.x), end, replace=False)
    spoken = utterance_batches(training), (training.x[:end], training.y[:end])
    shuffled = frame_batches(training), (training.x[some], training.y[some])
    rest = validation, arguments.epochs
    first, usual = train("One utterance a batch, momentum 0.99", 0.99, *spoken, *rest)
    _, lower = train("One utterance a batch, momentum 0.9", 0.9, *spoken, *rest)
    slow, _ = train("One utterance a batch, momentum 0.999", 0.999, *spoken, *rest)
    _, without = train("One utterance a batch, no BN", None, *spoken, *rest)
    _, mixed = train("Shuffled frames, momentum 0.99", 0.99, *shuffled, *rest)
    cured = cure("One utterance a batch, momentum 0.99", first, 0.99, training, *rest)
    cure("One utterance a batch, momentum 0.999", slow, 0.999, training, *rest)
    print("\nHow much of the moving average is batches, not start values")
    for count in (100, steps, 277_200):
        shares = [f"{new_weight(m, count):.1%} at {m}" for m in (0.9, 0.99, 0.999)]
        print(f"  after {count:7,} steps: {', '.join(shares)}")
    print(
        f"""
The advice, and what came of it (validation loss)
  none: momentum 0.99, one utterance a batch      {usual:8.3f}
  "a smaller momentum"                            {lower:8.3f}
  "no BatchNormalization"                         {without:8.3f}
  the same weights, statistics recalibrated       {cured:8.3f}
  shuffled frames, so that a batch is a sample    {mixed:8.3f}"""
    )


if __name__ == "__main__":
    main()
