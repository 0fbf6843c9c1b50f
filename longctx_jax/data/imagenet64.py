"""ImageNet64: images of 64 x 64 pixels as 12,288 bytes each, in row, column, channel order.

TFDS `imagenet_resized/64x64`: the first 1,200,000 training images train, the other 81,167 validate,
the official validation images are the test set. (An older, differently resized set has the same
name; numbers on the two are not comparable.) Each image is a document and a sample: it is predicted
from a separator and its own earlier bytes alone. Records are read and decoded when asked for.
"""

import collections
import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from longctx_jax.data import tfds_source
from longctx_jax.data.splits import Splits
from longctx_jax.data.streams import TextStream

IMAGE_SHAPE = (64, 64, 3)  # rows, columns, channels
IMAGE_BYTES = 12_288
IMAGENET64_IMAGES = {"train": 1_281_167, "validation": 50_000}  # official splits
IMAGENET64_TRAIN_IMAGES = 1_200_000
CACHED_IMAGES = 256  # decoded images a stream keeps


def load_imagenet64(data_dir: str) -> Splits:
    """Returns the splits of a prepared TFDS folder, `data_dir/imagenet_resized/64x64/VERSION`.

    A smaller copy is cut in the same proportion, with a warning.

    Raises:
        ImportError: if tensorflow_datasets is not installed.
        FileNotFoundError: if the data set is not prepared there, with the command that does it.
        ValueError: if it was prepared in a format without random access, or has no image to train
            or validate on.
    """
    records = tfds_source.open_records(
        "imagenet64", "imagenet_resized/64x64", data_dir, tuple(IMAGENET64_IMAGES)
    )
    counts = {split: len(found) for split, found in records.items()}
    n_train = IMAGENET64_TRAIN_IMAGES
    if counts != IMAGENET64_IMAGES:
        n_train = round(counts["train"] * IMAGENET64_TRAIN_IMAGES / IMAGENET64_IMAGES["train"])
        logging.warning(
            "numbers on this data are not ImageNet64 results: source=imagenet64 images=%s "
            "expected=%s",
            counts,
            IMAGENET64_IMAGES,
        )
    bounds = {
        "train": ("train", 0, n_train),
        "validation": ("train", n_train, counts["train"]),
        "test": ("validation", 0, counts["validation"]),
    }
    return Splits(
        "imagenet64",
        {
            split: functools.partial(
                ImageStream, f"imagenet64/{split}", records[official], start, stop
            )
            for split, (official, start, stop) in bounds.items()
        },
    )


class ImageStream(TextStream):
    """The bytes of a range of image records, each image a document, read when asked for."""

    sample_bytes = IMAGE_BYTES

    def __init__(self, name: str, records: Sequence[dict[str, Any]], start: int, stop: int):
        """Takes records `start .. stop-1`, without reading any.

        Args:
            name: as `TextStream.name`.
            records: random access to dicts with `image`, uint8 of `IMAGE_SHAPE`.
            start, stop: the range, at least one record.
        """
        if not 0 <= start < stop <= len(records):
            raise ValueError(
                f"{name} must have at least one image: got records [{start}, {stop}) of "
                f"{len(records)}; prepare the whole data set"
            )
        n_images = stop - start
        super().__init__(name, n_images * IMAGE_BYTES, np.arange(n_images) * IMAGE_BYTES)
        self._records = records
        self._first = start
        self._images: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

    def _read(self, start: int, stop: int) -> np.ndarray:
        first, last = start // IMAGE_BYTES, -(-stop // IMAGE_BYTES)
        if start == stop:
            return np.zeros(0, np.uint8)
        pieces = [self._image(index) for index in range(first, last)]
        data = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return data[start - first * IMAGE_BYTES : stop - first * IMAGE_BYTES]

    def _image(self, index: int) -> np.ndarray:
        """Returns image `index`, uint8 [IMAGE_BYTES], from the cache if it is there."""
        with self._lock:
            if index in self._images:
                self._images.move_to_end(index)
                return self._images[index]
        image = np.asarray(self._records[self._first + index]["image"])
        if image.shape != IMAGE_SHAPE or image.dtype != np.uint8:
            raise ValueError(
                f"each image of {self.name} must be uint8 {IMAGE_SHAPE}: image {index} is "
                f"{image.dtype} {image.shape}; prepare the data set again"
            )
        image = np.ascontiguousarray(image).reshape(-1)
        image.flags.writeable = False
        with self._lock:
            self._images[index] = image
            self._images.move_to_end(index)
            while len(self._images) > CACHED_IMAGES:
                self._images.popitem(last=False)
        return image
