import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastpo.trainers import config as configs
from fastpo.trainers import run


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["cached", "copy"])
def test_two_ranks_give_the_weights_of_one(options, tmp_path, reference):
    """Gradients are reduced through the fused head, whatever was computed before training."""
    options |= {"reference": reference, "eval_share": 0.25}
    run.train_dpo(configs.build(configs.DPOConfig, options))
    config = tmp_path / "run.yaml"
    two = options | {"output": str(tmp_path / "two"), "batch_size": options["batch_size"] // 2}
    config.write_text(yaml.safe_dump(two))
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 -m fastpo train dpo"
    done = subprocess.run(
        [sys.executable, *command.split(), "--config", str(config)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    got, want = (load_file(f"{o['output']}/model.safetensors") for o in (two, options))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=2e-5, msg=name)
