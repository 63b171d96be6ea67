"""Nothing that is drawn, reported or logged ends a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from medlit import errors
from medlit.callbacks import report
from medlit.callbacks.throughput import Throughput

if TYPE_CHECKING:
    from conftest import Medlit


def broken(*args: Any, **given: Any) -> Any:  # noqa: ANN401
    raise RuntimeError("out of ink")


@pytest.mark.filterwarnings("default:medlit continues without")
def test_a_fit_survives_whatever_draws_and_logs(
    run_medlit: Medlit, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    monkeypatch.setattr(errors, "WARNED", set())
    for place, name in (
        (report, "confusion_figure"),
        (report, "uncertainty"),
        (Throughput, "mean_rates"),
        (SummaryWriter, "add_scalar"),
    ):
        monkeypatch.setattr(place, name, broken)
    run = tmp_path / "run"
    with pytest.warns(UserWarning, match="continues without") as caught:
        assert run_medlit("fit", "--config", tiny_config, "--run_dir", run).code == 0
    lost = [str(each.message) for each in caught if "medlit continues without" in str(each.message)]
    assert len(lost) == len(errors.WARNED) == 4
    assert (run / "checkpoints" / "best.ckpt").is_file()
    assert not (run / "confusion_fit.png").exists()
