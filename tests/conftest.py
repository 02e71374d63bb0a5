"""One torch thread (on a busy machine two can be many times slower), and a tiny model for all tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from model import ModelConfig, MultiViewUNet  # noqa: E402

torch.set_num_threads(1)
TINY = ModelConfig(image_size=16, patch=4, channels=32, head_dim=8)


def random_model(**changes) -> MultiViewUNet:
    """A tiny network whose every weight is random, the zero-initialised view embedding included."""
    torch.manual_seed(0)
    model = MultiViewUNet(ModelConfig(**{**vars(TINY), **changes}))
    torch.nn.init.normal_(model.unet.class_embedding.weight, std=0.5)
    return model.eval()


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch) -> None:
    """Toys are cached under ./out/data: tests that run side by side would wait for each other."""
    monkeypatch.chdir(tmp_path)


class Asked(Exception):
    """Ends a stage where its work would begin."""


@pytest.fixture
def autocasts(monkeypatch) -> list[bool]:
    """Of every forward of a network: does it run in bfloat16?"""
    seen, stock = [], MultiViewUNet.forward

    def spy(self, *args):
        seen.append(torch.is_autocast_enabled("cpu"))
        return stock(self, *args)

    monkeypatch.setattr(MultiViewUNet, "forward", spy)
    return seen


@pytest.fixture
def tiny() -> MultiViewUNet:
    return random_model()


@pytest.fixture
def tiny_folder(tmp_path) -> str:
    random_model().save(tmp_path / "tiny")
    return str(tmp_path / "tiny")
