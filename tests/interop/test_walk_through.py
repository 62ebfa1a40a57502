"""The walk-through of docs/checkpoints.md, as printed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.long


def test_it_runs_from_top_to_bottom(tmp_path, user_environment):
    pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5.18")
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    script = re.search(r"## A walk-through\n.*?```bash\n(.*?)```", page, re.DOTALL)[1]
    paths = {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, env=user_environment | paths, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("check: logits differ by") == 2 and done.stdout.rstrip().endswith("619339008")
    (answer,) = map(json.loads, (tmp_path / "continued.jsonl").read_text().splitlines())
    assert len(answer["ids"]) <= 8
    tuned = tmp_path / "switch-base-8-further"
    assert json.loads((tuned / "config.json").read_text())["expert_capacity"] == 64
    assert (tuned / "spiece.model").exists() and (tuned / "tokenizer.json").exists()
    assert (tmp_path / "runs" / "further" / "report.html").exists()
