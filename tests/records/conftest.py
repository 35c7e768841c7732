"""Run folders as a training writes them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lorica.records.watch import Watched
from lorica.records.write import RunFolder, RunRecorder
from records.run_rows import CONFIG, SAMPLES, SCORES, manifest_for, rows_for


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder; adapters, number of steps, summary, samples and manifest can be
    chosen.
    """

    def make(
        name: str = "run",
        *,
        adapters: tuple[str, ...] = ("e2e",),
        num_steps: int = 200,
        summary: dict | None = None,
        samples: list[dict] = SAMPLES,
        manifest: dict | None = None,
        finish: bool = True,
    ) -> Path:
        path = tmp_path / name
        with RunFolder.create(path) as folder:
            recorder = Watched(RunRecorder(folder, config=CONFIG))
            recorder.start(manifest or manifest_for(*adapters))
            for index, adapter in enumerate(adapters):
                for row in rows_for(adapter, num_steps, index):
                    recorder.step(row)
                written = folder.adapter(adapter if len(adapters) > 1 else None)
                written.mkdir(parents=True)
                (written / "adapter_config.json").write_text('{"peft_type": "LORA"}')
            recorder.event("checkpoint", "saved step 200")
            folder.write_samples(samples)
            if finish:
                default = {"scores": SCORES, "resources": {"seconds": 151.2, "device": "cpu"}}
                recorder.finish(default if summary is None else summary)
        return path

    return make
