import concurrent.futures
import sys

import numpy as np
import pytest

from longctx_jax import data
from longctx_jax.data import imagenet64

N_TRAIN, N_TEST = 16, 3


def image(index):
    return np.random.default_rng(index).integers(0, 256, (64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Returns a folder with a small data set of ImageNet64's name and fields."""
    tfds = pytest.importorskip("tensorflow_datasets")
    from PIL import Image

    class ImagenetResized(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("0.1.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="64x64")]
        pkg_dir_path = None

        def _info(self):
            fields = {
                "image": tfds.features.Image(shape=(64, 64, 3)),
                "label": tfds.features.ClassLabel(num_classes=1000),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(fields))

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(range(N_TRAIN)),
                "validation": self._generate_examples(range(100, 100 + N_TEST)),
            }

        def _generate_examples(self, indices):
            for index in indices:
                yield index, {"image": Image.fromarray(image(index)), "label": 7}

    folder = tmp_path_factory.mktemp("tfds")
    builder = ImagenetResized(data_dir=str(folder), config="64x64", file_format="array_record")
    builder.download_and_prepare()
    return folder


@pytest.fixture
def splits(make_config, prepared):
    return data.load_source(make_config(name="imagenet64", data_dir=str(prepared)))


def images_of(stream):
    return stream.read(0, stream.n_bytes).reshape(-1, 64, 64, 3)


def index_of(found):
    """Returns which image this is."""
    indices = [*range(N_TRAIN), *range(100, 100 + N_TEST)]
    return next(index for index in indices if (image(index) == found).all())


def test_images_are_split_as_published(splits):
    found = {split: [index_of(x) for x in images_of(splits[split])] for split in splits}
    assert [len(found[split]) for split in ("train", "validation", "test")] == [15, 1, 3]
    assert sorted(found["train"] + found["validation"]) == list(range(N_TRAIN))
    assert sorted(found["test"]) == [100, 101, 102]
    assert splits["test"].name == "imagenet64/test" and splits["test"].sample_bytes == 12_288
    assert "tensorflow" not in sys.modules


def test_the_official_split_sizes_are_published_ones():
    assert imagenet64.IMAGENET64_TRAIN_IMAGES == 1_200_000
    n_train = imagenet64.IMAGENET64_IMAGES["train"]
    assert round(n_train * 1_200_000 / n_train) == 1_200_000 and n_train - 1_200_000 == 81_167


@pytest.mark.parametrize("cached", [256, 1])
def test_any_range_can_be_read_from_threads(splits, monkeypatch, cached):
    monkeypatch.setattr(imagenet64, "CACHED_IMAGES", cached)
    stream = splits["train"]
    whole = images_of(stream).ravel()
    rng = np.random.default_rng(0)
    ranges = np.sort(rng.integers(0, stream.n_bytes + 1, (60, 2)), axis=1).tolist()
    ranges += [[12_288, 24_576], [5, 5], [stream.n_bytes, stream.n_bytes]]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for (start, stop), piece in zip(
            ranges, pool.map(lambda bounds: stream.read(*bounds), ranges), strict=True
        ):
            assert (piece == whole[start:stop]).all()
    assert len(stream._images) <= cached


class Records:
    """Images made when asked for; counts."""

    def __init__(self, n):
        self.n, self.reads = n, 0

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        self.reads += 1
        return {"image": np.full((64, 64, 3), index % 256, np.uint8)}


def test_images_are_read_when_asked_for_and_kept():
    records = Records(1_281_167)
    stream = imagenet64.ImageStream("s", records, 1_200_000, 1_281_167)
    assert stream.n_bytes == 81_167 * 12_288 and records.reads == 0
    tokens = data.tokenize(stream, data.build_tokenizer("delimited_bytes"))
    assert tokens.n_tokens == 81_167 * 12_289 and records.reads == 0
    last = tokens.read(tokens.n_tokens - 3, tokens.n_tokens)
    assert last.tolist() == [1_281_166 % 256] * 2 + [256] and records.reads == 1
    for _ in range(3):
        stream.read(0, 30_000)
    assert records.reads == 4


def test_a_row_is_an_image(splits):
    stream = splits["train"]
    dataset = data.make_dataset(
        stream,
        data.build_tokenizer("delimited_bytes"),
        seq_len=imagenet64.IMAGE_BYTES,
        global_batch_size=5,
        seed=0,
        order="shuffled",
        vocab_size=257,
    )
    rows = [dataset[step] for step in range(3)]
    targets = np.concatenate([batch["targets"] for batch in rows])
    found = [index_of(row.reshape(64, 64, 3)) for row in targets]
    assert sorted(found) == sorted(index_of(x) for x in images_of(stream))
    for batch in rows:
        assert (batch["tokens"][:, 0] == 256).all() and (batch["weights"] == 1).all()
        assert (batch["segment_ids"] == batch["segment_ids"][:, :1]).all()


def test_other_images_are_refused():
    records = [{"image": np.zeros((32, 32, 3), np.uint8)}]
    stream = imagenet64.ImageStream("s", records, 0, 1)
    with pytest.raises(ValueError, match=r"must be uint8 \(64, 64, 3\): image 0 .*\(32, 32, 3\)"):
        stream.read(0, 1)
    with pytest.raises(ValueError, match="s must have at least one image"):
        imagenet64.ImageStream("s", records, 1, 1)


def test_not_prepared_gives_the_command(make_config, tmp_path):
    message = "tfds build imagenet_resized/64x64 --file_format=array_record"
    with pytest.raises(FileNotFoundError, match=message):
        data.load_source(make_config(name="imagenet64", data_dir=str(tmp_path)))


def test_text_tools_refuse_images(splits):
    from longctx_jax.data.sentencepiece_training import train_model

    with pytest.raises(ValueError, match="trained on text: imagenet64/test"):
        train_model(splits["test"], vocab_size=300)
    with pytest.raises(ValueError, match=r"config\.data\.tokenizer must be 'delimited_bytes'"):
        data.tokenize(splits["test"], data.build_tokenizer("bytes"))
