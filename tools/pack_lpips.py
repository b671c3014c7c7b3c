"""One-off: pack LPIPS weights as safetensors; `tokenizer/assets/README.md` says where from.

    python tools/pack_lpips.py lpips_alex_v0.1_full.pth tokenizer/assets

AlexNet's trunk and v0.1 heads become half precision.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


def main(source: Path, out: Path) -> None:
    alex = torch.load(source, map_location="cpu", weights_only=True)
    weights = {k: v.half().contiguous() for k, v in alex.items() if k not in ("shift", "scale")}
    save_file(weights, out / "lpips_alex.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
