// The tiles of the Hopper kernel: the planner's candidates and the kernel's instantiations both come from this table.
// To add a tile, add a row here and name it in one file of cuda/sm90/instantiations/ (and in an ..._ahead.cu where
// stages_ahead() is not zero).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "format/divide_up.h"

namespace marlin_qqq::plan {

// How the warpgroups of a block share the work.
enum class Cooperation {
  // Two warpgroups, each with half of the tile's output features, read the same ring of stages, which a warp of its own
  // fills. For many tokens.
  kFeatures,
  // Two warpgroups take turns at the block's tiles, with one ring for both: while one stores, the other multiplies. For
  // layers of few inputs and more tiles than multiprocessors. Per-channel: with group scales a warpgroup alone does not
  // keep up with the tensor core.
  kPingpong,
  // Every warpgroup has a ring of its own, which it fills itself, and its part of the inputs (k); their sums are added
  // at the end. For few tokens: no warpgroup waits for another, and no registers go to a warp that only copies.
  kDepth,
  // Every warp has a ring of its own, its part of the inputs and all of the tile's 64 features, which it multiplies
  // with mma.sync. For the fewest tokens: warps never meet before the end, and one load serves four products.
  kWarp,
  // The same, by blocks that walk over tiles: where one ends, a ring goes on with the next one's stages, so that
  // weights arrive all the time. For the fewest tokens and more tiles than multiprocessors.
  kFlow,
};

// Blocks of a cluster: the portable limit.
inline constexpr int kLargestClusterSplit = 8;

// Shared memory of a multiprocessor; the system takes 1 KB a block of it.
inline constexpr int kSm90SharedMemory = 228 * 1024;
inline constexpr int kSm90SystemMemory = 1024;
inline constexpr int kSm90LargestBlockMemory = kSm90SharedMemory - kSm90SystemMemory;

// Rows of the largest box that TMA takes.
inline constexpr int kLargestCopy = 256;

// Inputs of a token that a product's kernel quantises: every block reads every row, and of longer ones that takes more
// than a kernel of its own.
inline constexpr int64_t kLongestQuantizedRow = 16384;

struct Sm90Tile {
  std::string_view name;
  int blocks;  // 64-row products a warpgroup keeps: its features are 64 * blocks. 1 or 2. kWarp: 4, of 16 rows a warp
  int tokens;  // n of the product: a multiple of 8 (up to 32) or 16 (up to 320; beyond 256 it is two products). Sums a
               // thread: blocks * tokens / 2 <= 160
  Cooperation cooperation;
  int warpgroups;     // that multiply
  int stages;         // of 128 inputs, a ring
  int blocks_per_sm;  // thread blocks that must fit on a multiprocessor together

  // Bytes and shapes that follow from a row
  constexpr bool flows() const { return cooperation == Cooperation::kFlow; }
  constexpr bool warp_rings() const { return cooperation == Cooperation::kWarp || flows(); }
  // Half as many warps as other such tiles, of two blocks a multiprocessor.
  constexpr bool four_warps() const { return warp_rings() && warpgroups == 1; }
  constexpr bool pingpong() const { return cooperation == Cooperation::kPingpong; }
  constexpr bool takes_group_scales() const { return !pingpong(); }
  constexpr bool depth_split() const { return cooperation == Cooperation::kDepth || warp_rings(); }
  // A product's tiles: of tokens, by those of features that a cluster's blocks with the same activations take together.
  constexpr int64_t token_tiles(int64_t num_tokens) const { return divide_up(num_tokens, tokens); }
  constexpr int64_t feature_groups(int64_t out_features, int multicast) const {
    return divide_up(out_features, int64_t{features()} * multicast);
  }
  // Whether a block walks over tiles.
  constexpr bool walks() const { return !depth_split() || flows(); }
  constexpr int rings() const { return warp_rings() ? 4 * warpgroups : depth_split() ? warpgroups : 1; }
  // More sums than those of 64 features and 256 tokens a warpgroup, by which nearly all registers are taken.
  constexpr bool large() const { return !pingpong() && blocks * tokens > 256; }
  constexpr int warpgroup_features() const { return (warp_rings() ? 16 : 64) * blocks; }
  constexpr int features() const {
    return warpgroup_features() * (cooperation == Cooperation::kFeatures ? warpgroups : 1);
  }
  constexpr int panel_features() const { return features() < 128 ? features() : 128; }  // of one copy of weights
  constexpr int activation_bytes() const { return tokens * 128; }
  // Copies that bring a stage's activations: one of each of the `multicast` blocks that load them for all, or two of
  // one block, where they are more rows than one copy may have.
  constexpr int activation_copies(int multicast) const {
    return multicast == 1 && tokens > kLargestCopy ? 2 : multicast;
  }
  // Tokens of one of them: no more than there are. The 128-byte swizzle repeats every eight rows, where every part but
  // the first has to start.
  constexpr int activation_rows(int64_t num_tokens, int multicast) const {
    const int loaded = num_tokens < tokens ? static_cast<int>(num_tokens) : tokens;
    const int copies = activation_copies(multicast);
    return copies == 1 ? loaded : (loaded + 8 * copies - 1) / (8 * copies) * 8;
  }
  constexpr int weight_bytes() const { return features() * 64; }
  constexpr int scale_bytes() const { return features() * 2; }
  constexpr int stage_bytes(bool grouped) const {
    return activation_bytes() + weight_bytes() + (grouped ? scale_bytes() : 0);
  }
  // With room for scales in both modes.
  constexpr int ring_bytes() const { return (stages * stage_bytes(/*grouped=*/true) + 1023) / 1024 * 1024; }
  // A warp that only copies gets a warpgroup's worth of threads, so that it can hand registers over.
  constexpr int threads() const { return 128 * (warpgroups + (depth_split() ? 0 : 1)); }
  // Output staging: each warpgroup has room for `store_buffers` chunks of `store_tokens` rows; 64 features of two bytes
  // are 128 bytes of a row. Larger chunks are fewer fences. The last one may be half of one, so that a copy has
  // `store_rows` rows.
  constexpr int store_tokens() const { return blocks == 1 ? 32 : 16; }
  constexpr int store_chunks() const { return static_cast<int>(divide_up(tokens, store_tokens())); }
  constexpr int store_rows() const { return tokens % store_tokens() == 0 ? store_tokens() : store_tokens() / 2; }
  constexpr int chunk_bytes() const { return blocks * store_tokens() * 128; }
  constexpr int store_buffers() const { return blocks == 1 && tokens > 304 ? 3 : 4; }  // of 320 tokens three fit
  constexpr int staging_bytes() const { return depth_split() ? 0 : warpgroups * store_buffers() * chunk_bytes(); }
  // Where sums meet when the work of a tile is split: int32 [tokens][features + 4] beside the rings, if there is room,
  // to which each ring adds its own; else [rings][tokens][features + 4] in the place of the stages.
  constexpr int partial_pitch() const { return features() + 4; }
  constexpr int sum_bytes() const { return tokens * partial_pitch() * 4; }
  constexpr bool sums_apart() const {
    return depth_split() && fits(rings() * ring_bytes() + sum_bytes() + fixed_bytes());
  }
  constexpr int partial_bytes() const { return sums_apart() ? 0 : rings() * sum_bytes(); }
  // Rings that flow on have the next tile's sums besides, and what the other block of a cluster sends of half of the
  // features of a tile that they share.
  constexpr int sums_apart_tiles() const { return flows() ? 2 : sums_apart() ? 1 : 0; }
  constexpr int sums_apart_bytes() const {
    return sums_apart_tiles() * sum_bytes() + (flows() ? tokens * features() / 2 * 4 : 0);
  }
  // Where the blocks of a cluster of `split` add up what they have of a tile: the sums that a block receives from the
  // others, each of which finishes a share of the tokens, and its own partial sums where those lie in shared memory
  // too. See exchange.cuh, and reduce_tile in ring_sums.cuh.
  constexpr int exchange_bytes(int split) const {
    const int chunk = depth_split() ? 1 : store_tokens();
    const int chunks = depth_split() ? tokens : store_chunks();
    const int received = (split - 1) * static_cast<int>(divide_up(chunks, split)) * chunk * features() * 4;
    return received + (depth_split() ? partial_bytes() : 0);
  }
  // The rings, or the sums that take their place at the end. There is room for a cluster of two.
  constexpr int pipeline_bytes() const {
    return std::max({rings() * ring_bytes(), partial_bytes(), exchange_bytes(2)});
  }
  constexpr bool room_for_exchange(int split) const { return exchange_bytes(split) <= pipeline_bytes(); }
  // The token scales of the block's tile and the channel scales and biases of its features, or the token scales of the
  // warpgroups' tiles, this one's and the next one's.
  constexpr int token_scale_bytes() const { return (depth_split() ? 1 : warpgroups * 2) * 4 * tokens; }
  constexpr int feature_factor_bytes() const { return depth_split() && !flows() ? 6 * features() : 0; }
  constexpr int exchange_barriers() const { return depth_split() ? 1 : (store_chunks() + 1) / 2; }
  // These, barriers, and the slack that aligns the stages to 1,024 bytes.
  constexpr int fixed_bytes() const {
    return 8 * (2 * stages * rings() + exchange_barriers()) + token_scale_bytes() + feature_factor_bytes() + 1024 + 64;
  }
  constexpr int shared_memory_bytes() const {
    return staging_bytes() + pipeline_bytes() + sums_apart_bytes() + fixed_bytes();
  }
  // Whether the blocks that must fit on a multiprocessor do, with so much shared memory each.
  constexpr bool fits(int block_memory) const {
    return blocks_per_sm * (block_memory + kSm90SystemMemory) <= kSm90SharedMemory;
  }
  // Stages of a ring that are dequantised to registers while the kernel before this one ends (see sm90_stages_ahead).
  // For warpgroups with group scales where `warp` tiles do not do it better (up to 32 tokens), and where a
  // quantisation's block still fits beside them (up to 80).
  constexpr int stages_ahead(bool grouped) const {
    const bool narrow = cooperation == Cooperation::kDepth && blocks == 1 && warpgroups == 4;
    return cooperation == Cooperation::kWarp || (grouped && narrow && tokens > 32 && tokens <= 80) ? 2 : 0;
  }
  // Whether there is a kernel that quantises its activations, and the shared memory that it needs besides: the int8
  // rows of a block's stages (and what wgmma reads of eight rows where there are fewer), the tokens' scales and a
  // largest magnitude a warp, and the alignment of the rows. Four warps would have registers for half a row only.
  constexpr bool can_quantize() const { return depth_split() && blocks > 1 && tokens == 8 && !four_warps(); }
  static constexpr int quantized_vectors() { return 8; }  // of 8 elements, that a thread keeps in registers
  // Warps that share a token: all, halved until every token has one.
  constexpr int token_warps(int64_t num_tokens) const {
    int warps = 4 * warpgroups;
    while (warps * num_tokens > 4 * warpgroups) warps /= 2;
    return warps;
  }
  constexpr bool can_quantize(int64_t num_tokens, int64_t in_features) const {
    return can_quantize() && num_tokens <= tokens && in_features <= kLongestQuantizedRow &&
           in_features <= 8 * quantized_vectors() * 32 * token_warps(num_tokens);
  }
  constexpr int quantization_bytes(int64_t num_tokens, int64_t block_stages) const {
    return static_cast<int>(128 * (num_tokens * block_stages + tokens - num_tokens)) + 4 * 4 * warpgroups + 128;
  }
};

// clang-format off
inline constexpr Sm90Tile kSm90Tiles[] = {
    // The fewest tokens: eight warps, each with its own stages.
    {"warp8",      4,   8, Cooperation::kWarp,     2,  4, 1},
    {"warp16",     4,  16, Cooperation::kWarp,     2,  4, 1},
    {"warp24",     4,  24, Cooperation::kWarp,     2,  3, 1},
    {"warp32",     4,  32, Cooperation::kWarp,     2,  3, 1},
    // Four warps, and two blocks a multiprocessor: where tiles do not fill the device evenly, all blocks of the next
    // launch find room beside those that are left.
    {"pair8",      4,   8, Cooperation::kWarp,     1,  4, 2},
    {"pair16",     4,  16, Cooperation::kWarp,     1,  4, 2},
    {"pair24",     4,  24, Cooperation::kWarp,     1,  3, 2},
    {"pair32",     4,  32, Cooperation::kWarp,     1,  3, 2},
    // Narrow: 64 features and all of the inputs, so that most layers need no split; a ring of three to ten stages a
    // warpgroup keeps 200 KB on their way.
    {"narrow8",    1,   8, Cooperation::kDepth,    4, 10, 1},
    {"narrow16",   1,  16, Cooperation::kDepth,    4,  8, 1},
    {"narrow24",   1,  24, Cooperation::kDepth,    4,  7, 1},
    {"narrow32",   1,  32, Cooperation::kDepth,    4,  6, 1},
    {"narrow48",   1,  48, Cooperation::kDepth,    4,  5, 1},
    {"narrow64",   1,  64, Cooperation::kDepth,    4,  4, 1},
    {"narrow80",   1,  80, Cooperation::kDepth,    4,  3, 1},
    {"narrow96",   1,  96, Cooperation::kDepth,    4,  3, 1},
    // Tall: two warpgroups with deeper rings, and up to 320 tokens, for layers whose features are too few tiles of 128.
    {"tall32",   1,  32, Cooperation::kDepth,    2, 13, 1},
    {"tall48",   1,  48, Cooperation::kDepth,    2, 10, 1},
    {"tall64",   1,  64, Cooperation::kDepth,    2,  9, 1},
    {"tall80",   1,  80, Cooperation::kDepth,    2,  7, 1},
    {"tall96",   1,  96, Cooperation::kDepth,    2,  6, 1},
    {"tall112",  1, 112, Cooperation::kDepth,    2,  6, 1},
    {"tall128",  1, 128, Cooperation::kDepth,    2,  5, 1},
    {"tall144",  1, 144, Cooperation::kDepth,    2,  5, 1},
    {"tall160",  1, 160, Cooperation::kDepth,    2,  4, 1},
    {"tall176",  1, 176, Cooperation::kDepth,    2,  4, 1},
    {"tall192",  1, 192, Cooperation::kDepth,    2,  3, 1},
    {"tall208",  1, 208, Cooperation::kDepth,    2,  3, 1},
    {"tall224",  1, 224, Cooperation::kDepth,    2,  3, 1},
    {"tall240",  1, 240, Cooperation::kDepth,    2,  3, 1},
    {"tall256",  1, 256, Cooperation::kDepth,    2,  3, 1},
    {"tall272",  1, 272, Cooperation::kDepth,    2,  2, 1},
    {"tall288",  1, 288, Cooperation::kDepth,    2,  2, 1},
    {"tall304",  1, 304, Cooperation::kDepth,    2,  2, 1},
    {"tall320",  1, 320, Cooperation::kDepth,    2,  2, 1},
    // The narrow ones with twice the features: half the activations' traffic, and fewer instructions a weight.
    {"quad8",      2,   8, Cooperation::kDepth,    4,  5, 1},
    {"quad16",     2,  16, Cooperation::kDepth,    4,  5, 1},
    {"quad32",     2,  32, Cooperation::kDepth,    4,  4, 1},
    {"quad48",     2,  48, Cooperation::kDepth,    4,  3, 1},
    {"quad64",     2,  64, Cooperation::kDepth,    4,  3, 1},
    // Two blocks a multiprocessor, for layers with more tiles than multiprocessors: while one block starts or ends, the
    // other streams.
    {"stream8",    2,   8, Cooperation::kDepth,    2,  5, 2},
    {"stream16",   2,  16, Cooperation::kDepth,    2,  5, 2},
    {"stream24",   2,  24, Cooperation::kDepth,    2,  4, 2},
    {"stream32",   2,  32, Cooperation::kDepth,    2,  4, 2},
    {"stream48",   2,  48, Cooperation::kDepth,    2,  3, 2},
    {"stream64",   2,  64, Cooperation::kDepth,    2,  3, 2},
    // The warps' tiles, one after the other.
    {"flow8",      4,   8, Cooperation::kFlow,     2,  4, 1},
    {"flow16",     4,  16, Cooperation::kFlow,     2,  4, 1},
    {"flow24",     4,  24, Cooperation::kFlow,     2,  3, 1},
    {"flow32",     4,  32, Cooperation::kFlow,     2,  3, 1},
    // Wide features, medium tokens: 256 features a block halve the activations' traffic.
    {"wide64",    2,  64, Cooperation::kFeatures, 2, 7, 1},
    {"wide80",    2,  80, Cooperation::kFeatures, 2, 7, 1},
    {"wide96",    2,  96, Cooperation::kFeatures, 2, 6, 1},
    {"wide112",   2, 112, Cooperation::kFeatures, 2, 6, 1},
    {"wide128",   2, 128, Cooperation::kFeatures, 2, 5, 1},
    {"wide144",   2, 144, Cooperation::kFeatures, 2, 5, 1},
    {"wide160",   2, 160, Cooperation::kFeatures, 2, 5, 1},
    // Turns: a warpgroup's 128 features are the block's.
    {"pingpong64",  2,  64, Cooperation::kPingpong, 2, 8, 1},
    {"pingpong80",  2,  80, Cooperation::kPingpong, 2, 8, 1},
    {"pingpong96",  2,  96, Cooperation::kPingpong, 2, 8, 1},
    {"pingpong112", 2, 112, Cooperation::kPingpong, 2, 8, 1},
    {"pingpong128", 2, 128, Cooperation::kPingpong, 2, 7, 1},
    {"pingpong144", 2, 144, Cooperation::kPingpong, 2, 6, 1},
    {"pingpong160", 2, 160, Cooperation::kPingpong, 2, 6, 1},
    // Wide tokens: the dequantisation of a weight serves up to 320 tokens, which hides the group scales.
    {"deep64",    1,  64, Cooperation::kFeatures, 2, 10, 1},
    {"deep80",    1,  80, Cooperation::kFeatures, 2, 10, 1},
    {"deep96",    1,  96, Cooperation::kFeatures, 2, 8, 1},
    {"deep112",   1, 112, Cooperation::kFeatures, 2, 8, 1},
    {"deep128",   1, 128, Cooperation::kFeatures, 2, 7, 1},
    {"deep144",   1, 144, Cooperation::kFeatures, 2, 7, 1},
    {"deep160",   1, 160, Cooperation::kFeatures, 2, 6, 1},
    {"deep176",   1, 176, Cooperation::kFeatures, 2, 6, 1},
    {"deep192",   1, 192, Cooperation::kFeatures, 2, 5, 1},
    {"deep208",   1, 208, Cooperation::kFeatures, 2, 5, 1},
    {"deep224",   1, 224, Cooperation::kFeatures, 2, 5, 1},
    {"deep240",   1, 240, Cooperation::kFeatures, 2, 4, 1},
    {"deep256",   1, 256, Cooperation::kFeatures, 2, 4, 1},
    {"deep272",   1, 272, Cooperation::kFeatures, 2, 4, 1},
    {"deep288",   1, 288, Cooperation::kFeatures, 2, 4, 1},
    {"deep304",   1, 304, Cooperation::kFeatures, 2, 4, 1},
    {"deep320",   1, 320, Cooperation::kFeatures, 2, 4, 1},
};
// clang-format on
inline constexpr int kSm90TileCount = sizeof(kSm90Tiles) / sizeof(kSm90Tiles[0]);

constexpr int sm90_tile_index(std::string_view name) {
  for (int i = 0; i < kSm90TileCount; ++i) {
    if (kSm90Tiles[i].name == name) return i;
  }
  return -1;
}

constexpr bool sm90_tiles_are_sound() {
  for (const Sm90Tile& tile : kSm90Tiles) {
    if (tile.blocks * tile.tokens > 320) return false;                  // registers for sums
    if (tile.tokens % (tile.tokens <= 32 ? 8 : 16) != 0) return false;  // n of integer wgmma
    if (!tile.depth_split() && (tile.warpgroups != 2 || tile.blocks_per_sm != 1)) return false;
    if (!tile.fits(tile.shared_memory_bytes())) return false;
  }
  return true;
}
static_assert(sm90_tiles_are_sound(), "a tile breaks a limit of the hardware: see sm90_tiles_are_sound");

}  // namespace marlin_qqq::plan
