// The tiles of the mma.sync kernel (sm_80 and every later GPU without a path of its own): the planner's candidates and
// the kernel's instantiations both come from this table. To add a tile, add a row here and name it in one file of
// cuda/sm80/instantiations/.
#pragma once

#include <string_view>

namespace marlin_qqq::plan {

struct Sm80Tile {
  std::string_view name;
  int warp_features;  // output features of a warp: 32 or 64
  int warp_tokens;    // tokens of a warp: a multiple of 16. Sums a thread: warp_features * warp_tokens / 32 <= 128
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
  // The epilogue passes over the tokens of a warp in runs of this many, through shared memory.
  constexpr int pass_tokens() const { return warp_tokens < 32 ? warp_tokens : 32; }
  constexpr int partial_pitch() const { return features() + 4; }
  constexpr int partial_bytes() const { return depth_warps * token_warps * pass_tokens() * partial_pitch() * 4; }
  constexpr int shared_memory_bytes() const {
    return stages * stage_bytes() > partial_bytes() ? stages * stage_bytes() : partial_bytes();
  }
};

// clang-format off
inline constexpr Sm80Tile kSm80Tiles[] = {
    //  name          features tokens  warps: f  t  d  depth stages blocks/SM
    {"mma16",               64,    16,        2, 1, 4,   128,    4, 2},
    {"mma32",               64,    32,        2, 1, 4,   128,    5, 1},
    {"mma64",               32,    64,        4, 1, 2,   128,    5, 1},
    {"mma128",              32,   128,        4, 1, 2,   128,    4, 1},
    {"mma128wide",          32,   128,        8, 1, 1,    64,    5, 1},
    {"mma256",              32,   128,        4, 2, 1,    64,    4, 1},
};
// clang-format on
inline constexpr int kSm80TileCount = sizeof(kSm80Tiles) / sizeof(kSm80Tiles[0]);

constexpr int sm80_tile_index(std::string_view name) {
  for (int i = 0; i < kSm80TileCount; ++i) {
    if (kSm80Tiles[i].name == name) return i;
  }
  return -1;
}

constexpr bool sm80_tiles_are_sound() {
  for (const Sm80Tile& tile : kSm80Tiles) {
    if (tile.warp_features * tile.warp_tokens / 32 > 128) return false;  // registers
    if (tile.depth % (32 * tile.depth_warps) != 0 || tile.warp_tokens % 16) return false;
    if (tile.features() % 64 != 0 || tile.threads() > 256) return false;
    if (tile.shared_memory_bytes() > 101376 / tile.blocks_per_sm) return false;  // a block's limit on sm_86, 89, 120
  }
  return true;
}
static_assert(sm80_tiles_are_sound(), "a tile breaks a limit of the hardware: see sm80_tiles_are_sound");

}  // namespace marlin_qqq::plan
