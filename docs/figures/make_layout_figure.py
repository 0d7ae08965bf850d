"""Draws docs/figures/packed_layout.svg, the picture of docs/format.md.

Every position is asked from the library (it packs numbered weights and looks where they went), so the picture cannot
say anything else than the code. Needs matplotlib and a built marlin_qqq:

    PYTHONPATH=python python docs/figures/make_layout_figure.py [file.svg | file.png]
"""

import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

matplotlib.use("svg")
import matplotlib.pyplot as plt

import marlin_qqq

# The word that the picture follows: it holds inputs 4..7 of output features 18 and 26.
INPUT, OUTPUT = 4, 18
LANE_COLOURS = [plt.get_cmap("Set3")(i) for i in (4, 5, 6, 9, 0, 7, 10, 3)]
HIGHLIGHT = "black"


def nibble_positions(group_size: int) -> torch.Tensor:
    """Position 8 * word + nibble of every weight of a tile, int64 [16, 64]: packs the bits of each weight's number."""
    in_features = 128
    number = torch.arange(16 * 64).reshape(16, 64)
    found = torch.zeros(128 * 8, dtype=torch.int64)
    for bit in range(10):
        codes = torch.zeros(in_features, 64, dtype=torch.int8)
        codes[:16] = (number >> bit & 1).to(torch.int8)
        words = marlin_qqq.pack_weight(codes, group_size)[0].to(torch.int64)
        nibbles = words[:, None] >> (4 * torch.arange(8)) & 15
        zero = 8 if group_size == 128 else 0
        found |= (nibbles.flatten() - zero) << bit
    positions = torch.empty(16 * 64, dtype=torch.int64)
    positions[found] = torch.arange(128 * 8)
    return positions.reshape(16, 64)


def shade(word: int) -> tuple[float, float, float]:
    """A hue for each group of four lanes (n % 8), darker for larger k."""
    red, green, blue, _ = LANE_COLOURS[word // 16]
    light = 1.0 - 0.11 * (word // 4 % 4)
    return red * light, green * light, blue * light


def draw_tile(ax: Axes, positions: torch.Tensor, word: int) -> None:
    ax.set_title(
        "One tile of the weight: 16 inputs x 64 output features, coloured by the lane that owns the word", loc="left"
    )
    for k in range(0, 16, 4):
        for n in range(64):
            owners = {int(position) // 8 for position in positions[k : k + 4, n]}
            assert len(owners) == 1, "four successive inputs share a word"
            ax.add_patch(Rectangle((n, k), 1, 4, facecolor=shade(owners.pop()), edgecolor="white", lw=0.4))
    for n in (OUTPUT, OUTPUT + 8):
        ax.add_patch(Rectangle((n, INPUT), 1, 4, fill=False, edgecolor=HIGHLIGHT, lw=2, zorder=3))
    ax.annotate(
        f"word {word}: k = {INPUT}..{INPUT + 3} of n = {OUTPUT} and n = {OUTPUT + 8}",
        xy=(OUTPUT + 9, INPUT + 2),
        xytext=(31, INPUT + 2.3),
        arrowprops={"arrowstyle": "-", "color": HIGHLIGHT},
        bbox={"facecolor": "white", "edgecolor": HIGHLIGHT, "pad": 2},
        va="center",
    )
    ax.set(xlim=(0, 64), ylim=(16, 0), aspect="equal", xlabel="output feature n", ylabel="input k")
    ax.set_xticks([n + 0.5 for n in range(0, 64, 8)], [str(n) for n in range(0, 64, 8)])
    ax.set_yticks([k + 0.5 for k in range(0, 16, 4)], [str(k) for k in range(0, 16, 4)])


def draw_words(ax: Axes, positions: torch.Tensor, word: int) -> None:
    ax.set_title("The same tile packed: 128 words, four for each of 32 lanes (16-byte loads)", loc="left")
    for w in range(128):
        x, y = w // 4, w % 4
        ax.add_patch(Rectangle((x, y), 1, 1, facecolor=shade(w), edgecolor="white", lw=0.6))
        k, n = divmod(int(torch.nonzero((positions // 8).flatten() == w)[0]), 64)
        ax.text(x + 0.5, y + 0.5, f"{k},{n}", ha="center", va="center", fontsize=5.5)
    ax.add_patch(Rectangle((word // 4, word % 4), 1, 1, fill=False, edgecolor=HIGHLIGHT, lw=2, zorder=3))
    ax.set(
        xlim=(0, 32), ylim=(4, 0), aspect="equal", xlabel="lane = word // 4  (in a cell: the first k, n of the word)"
    )
    ax.set_ylabel("word % 4")
    ax.set_xticks([lane + 0.5 for lane in range(32)], [str(lane) for lane in range(32)], fontsize=7)
    ax.set_yticks([i + 0.5 for i in range(4)], ["0", "1", "2", "3"])


def draw_nibbles(ax: Axes, title: str, positions: torch.Tensor, word: int) -> None:
    ax.set_title(title, loc="left")
    for nibble in range(8):
        k, n = divmod(int(torch.nonzero(positions.flatten() == 8 * word + nibble)[0]), 64)
        x = 7 - nibble  # most significant on the left, as numbers are written
        second = n != OUTPUT
        ax.add_patch(Rectangle((x, 0), 1, 1, facecolor="#f3d9b1" if second else "#c6dbef", edgecolor="black", lw=0.8))
        ax.text(x + 0.5, 0.5, f"k {k}\nn {n}", ha="center", va="center", fontsize=8)
        ax.text(x + 0.5, 1.22, f"{4 * nibble + 3}..{4 * nibble}", ha="center", va="center", fontsize=7)
    ax.set(xlim=(0, 8), ylim=(1.4, 0))
    ax.axis("off")


def draw_scales(ax: Axes, title: str, stored: torch.Tensor) -> None:
    ax.set_title(title, loc="left")
    for column, n in enumerate(stored.tolist()):
        ax.add_patch(Rectangle((column, 0), 1, 1, facecolor=LANE_COLOURS[n % 8], edgecolor="white", lw=0.6))
        ax.text(column + 0.5, 0.5, str(n), ha="center", va="center", fontsize=6.5)
    ax.set(xlim=(0, 64), ylim=(1, 0))
    ax.set_xticks([c + 0.5 for c in range(0, 64, 8)], [str(c) for c in range(0, 64, 8)])
    ax.set_yticks([])


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("packed_layout.svg")
    channel, group = nibble_positions(-1), nibble_positions(128)
    assert torch.equal(channel // 8, group // 8), "the modes differ in the nibbles only"
    word = int(channel[INPUT, OUTPUT]) // 8

    plt.rcParams.update(
        {"font.size": 8, "axes.titlesize": 9.5, "svg.fonttype": "none", "svg.hashsalt": "packed_layout"}
    )
    figure = plt.figure(figsize=(11, 9.4), layout="constrained")
    rows = figure.add_gridspec(5, 2, height_ratios=[3.3, 2.0, 1.1, 0.6, 0.6])
    draw_tile(figure.add_subplot(rows[0, :]), channel, word)
    draw_words(figure.add_subplot(rows[1, :]), channel, word)
    draw_nibbles(figure.add_subplot(rows[2, 0]), f"Word {word} per channel: nibble = code modulo 16", channel, word)
    draw_nibbles(figure.add_subplot(rows[2, 1]), f"Word {word} per group: nibble = code + 8", group, word)
    natural = torch.arange(64, dtype=torch.int32)
    draw_scales(
        figure.add_subplot(rows[3, :]),
        "s_group: output feature n in each stored column (blocks of 64)",
        marlin_qqq.permute_group_scale(natural),
    )
    draw_scales(
        figure.add_subplot(rows[4, :]),
        "s_channel: output feature n in each stored column (blocks of 32)",
        marlin_qqq.permute_channel_scale(natural),
    )
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None, dpi=110)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
