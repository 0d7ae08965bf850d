// The tiles of the mma.sync kernel (sm_80 and every later GPU without a path of its own): the planner's candidates and
// the kernel's instantiations both come from this table. To add a tile, add a row here and name it in one file of
// cuda/sm80/instantiations/.
#pragma once

#include <cstdint>
#include <string_view>

namespace marlin_qqq::plan {

struct Sm80Tile {
  std::string_view name;
  int warp_features;  // output features of a warp: 32 or 64
  int warp_tokens;    // tokens of a warp: a multiple of 8. Sums a thread: warp_features * warp_tokens / 32 <= 128
  int feature_warps;  // warps side by side along the output features,
  int token_warps;    // along the tokens,
  int depth_warps;    // and along the inputs (k) of a stage: their sums are added at the end
  int depth;          // inputs of a stage: 64 or 128
  int stages;
  int blocks_per_sm;  // thread blocks that must fit on a multiprocessor together

  constexpr int features() const { return warp_features * feature_warps; }
  constexpr int tokens() const { return warp_tokens * token_warps; }
  constexpr int threads() const { return 32 * feature_warps * token_warps * depth_warps; }
  constexpr int activation_bytes() const { return tokens() * depth; }
  constexpr int weight_bytes() const { return features() * depth / 2; }
  constexpr int scale_bytes() const { return features() * 2; }
  constexpr int stage_bytes() const { return activation_bytes() + weight_bytes() + scale_bytes(); }
  // The epilogue passes over the tokens of a warp in runs of eight, through shared memory of its own: the copies of the
  // block's next tile go on meanwhile.
  constexpr int pass_tokens() const { return 8; }
  constexpr int partial_pitch() const { return features() + 4; }
  constexpr int partial_bytes() const { return depth_warps * token_warps * pass_tokens() * partial_pitch() * 4; }
  constexpr int shared_memory_bytes() const { return stages * stage_bytes() + partial_bytes(); }
};

// clang-format off
inline constexpr Sm80Tile kSm80Tiles[] = {
    //  name          features tokens  warps: f  t  d  depth stages blocks/SM
    {"mma8",                64,     8,        4, 1, 2,   128,    3, 2},
    {"mma16",               64,    16,        4, 1, 2,   128,    3, 2},
    {"mma32",               64,    32,        4, 1, 2,   128,    4, 1},
    {"mma64",               64,    64,        4, 1, 2,   128,    4, 1},
    {"mma64lean",           64,    64,        4, 1, 2,   128,    3, 1},  // the lean ones fit into 99 KB: sm_86, 89, 120
    {"mma128",              64,    64,        4, 2, 1,   128,    4, 1},
    {"mma128lean",          64,    64,        4, 2, 1,    64,    5, 1},
    {"mma128wide",          32,   128,        8, 1, 1,   128,    4, 1},  // each weight is dequantised once: group scales
};
// clang-format on
inline constexpr int kSm80TileCount = sizeof(kSm80Tiles) / sizeof(kSm80Tiles[0]);

constexpr int sm80_tile_index(std::string_view name) {
  for (int i = 0; i < kSm80TileCount; ++i) {
    if (kSm80Tiles[i].name == name) return i;
  }
  return -1;
}

// Of a launch's tiles, those that one block has to itself; the others are shared, if the launch shares any.
constexpr int64_t sm80_whole_tiles(int64_t tiles, int64_t grid, bool shares) {
  return shares ? tiles / grid * grid : tiles;
}

constexpr bool sm80_tiles_are_sound() {
  for (const Sm80Tile& tile : kSm80Tiles) {
    if (tile.warp_features * tile.warp_tokens / 32 > 128) return false;  // registers
    if (tile.depth % (64 * tile.depth_warps) != 0 || tile.warp_tokens % 8) return false;
    if (tile.features() % 64 != 0 || tile.threads() > 256) return false;
    if (128 % (tile.features() / 4) != 0) return false;  // the reduction's threads: a token's sums, once or more
    if (tile.shared_memory_bytes() > 166912 / tile.blocks_per_sm) return false;  // sm_80's limit, a block
  }
  return true;
}
static_assert(sm80_tiles_are_sound(), "a tile breaks a limit of the hardware: see sm80_tiles_are_sound");

}  // namespace marlin_qqq::plan
