// pack_weight, unpack_weight, scale permutations.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
#include "format/limits.h"
#include "format/packed_weight.h"
#include "format/scale_permutation.h"

namespace marlin_qqq::cpu {
namespace {

using format::kTileInFeatures;
using format::kTileOutFeatures;

// Four successive in_features (r) of a tile against its columns 16 * j + 8 * b + c make 32 words. Written column by
// column c inside, so that compilers vectorise both directions.
constexpr int64_t kQuad = 4;
using Words = uint32_t[4][8];  // [j][c]

template <bool kGrouped>
void encode_quad(const int8_t* codes, int64_t out_features, Words& words) {
  for (int j = 0; j < 4; ++j) {
    uint32_t word[8] = {};
    for (int b = 0; b < 2; ++b) {
      for (int r = 0; r < kQuad; ++r) {
        const int8_t* row = codes + r * out_features + 16 * j + 8 * b;
        const int shift = 4 * format::packed_nibble(r, 8 * b, kGrouped);
        for (int c = 0; c < 8; ++c) {
          word[c] |= format::encode_nibble(row[c], kGrouped) << shift;
        }
      }
    }
    std::memcpy(words[j], word, sizeof(word));
  }
}

template <bool kGrouped>
void decode_quad(const Words& words, int64_t out_features, int8_t* codes) {
  for (int j = 0; j < 4; ++j) {
    for (int b = 0; b < 2; ++b) {
      for (int r = 0; r < kQuad; ++r) {
        int8_t* row = codes + r * out_features + 16 * j + 8 * b;
        const int shift = 4 * format::packed_nibble(r, 8 * b, kGrouped);
        int8_t decoded[8];
        for (int c = 0; c < 8; ++c) {
          decoded[c] = static_cast<int8_t>(format::decode_nibble(words[j][c] >> shift, kGrouped));
        }
        std::memcpy(row, decoded, sizeof(decoded));
      }
    }
  }
}

// Calls visit(first in_feature, first out_feature, first word) for every quad of one row of tiles.
template <typename Visit>
void for_each_quad(int64_t tile_row, int64_t out_features, Visit visit) {
  for (int64_t n = 0; n < out_features; n += kTileOutFeatures) {
    for (int64_t k = 0; k < kTileInFeatures; k += kQuad) {
      visit(tile_row * kTileInFeatures + k, n, tile_row * 2 * out_features + format::packed_word(k, n));
    }
  }
}

template <bool kGrouped>
void pack_rows(const int8_t* codes, int64_t in_features, int64_t out_features, int32_t* packed, int num_threads) {
  auto pack_row = [&](int64_t tile_row) {
    for_each_quad(tile_row, out_features, [&](int64_t k, int64_t n, int64_t first_word) {
      Words words;
      encode_quad<kGrouped>(codes + k * out_features + n, out_features, words);
      for (int c = 0; c < 8; ++c) {
        for (int j = 0; j < 4; ++j) {
          packed[first_word + format::packed_word(0, 16 * j + c)] = static_cast<int32_t>(words[j][c]);
        }
      }
    });
  };
  parallel_for(in_features / kTileInFeatures, num_threads, pack_row);
}

template <bool kGrouped>
void unpack_rows(const int32_t* packed, int64_t in_features, int64_t out_features, int8_t* codes, int num_threads) {
  auto unpack_row = [&](int64_t tile_row) {
    for_each_quad(tile_row, out_features, [&](int64_t k, int64_t n, int64_t first_word) {
      Words words;
      for (int c = 0; c < 8; ++c) {
        for (int j = 0; j < 4; ++j) {
          words[j][c] = static_cast<uint32_t>(packed[first_word + format::packed_word(0, 16 * j + c)]);
        }
      }
      decode_quad<kGrouped>(words, out_features, codes + k * out_features + n);
    });
  };
  parallel_for(in_features / kTileInFeatures, num_threads, unpack_row);
}

}  // namespace

void pack_weight(const int8_t* codes, int64_t in_features, int64_t out_features, bool grouped, int32_t* packed,
                 int num_threads) {
  (grouped ? pack_rows<true> : pack_rows<false>)(codes, in_features, out_features, packed, num_threads);
}

void unpack_weight(const int32_t* packed, int64_t in_features, int64_t out_features, bool grouped, int8_t* codes,
                   int num_threads) {
  (grouped ? unpack_rows<true> : unpack_rows<false>)(packed, in_features, out_features, codes, num_threads);
}

CodeRange code_range(const int8_t* codes, int64_t count, int num_threads) {
  constexpr int64_t kBlock = int64_t{1} << 20;
  const int64_t num_blocks = (count + kBlock - 1) / kBlock;
  std::vector<CodeRange> ranges(static_cast<size_t>(num_blocks), CodeRange{0, 0});
  auto scan_block = [&](int64_t block) {
    int8_t minimum = 127;
    int8_t maximum = -128;
    const int64_t end = std::min(count, (block + 1) * kBlock);
    for (int64_t i = block * kBlock; i < end; ++i) {
      minimum = std::min(minimum, codes[i]);
      maximum = std::max(maximum, codes[i]);
    }
    ranges[static_cast<size_t>(block)] = {minimum, maximum};
  };
  parallel_for(num_blocks, num_threads, scan_block);
  CodeRange total = num_blocks == 0 ? CodeRange{0, 0} : ranges[0];
  for (const CodeRange& range : ranges) {
    total = {std::min(total.minimum, range.minimum), std::max(total.maximum, range.maximum)};
  }
  return total;
}

namespace {

// Visits every (natural column, stored column) pair of one row.
template <typename Visit>
void for_each_column(ScaleKind kind, int64_t out_features, Visit visit) {
  for (int64_t n = 0; n < out_features; ++n) {
    visit(n, kind == ScaleKind::kGroup ? format::stored_group_scale_column(n) : format::stored_channel_scale_column(n));
  }
}

}  // namespace

void permute_scale(const void* natural, ScaleKind kind, int64_t rows, int64_t out_features, int element_bytes,
                   void* stored) {
  const auto size = static_cast<size_t>(element_bytes);
  for (int64_t row = 0; row < rows; ++row) {
    const char* source = static_cast<const char*>(natural) + row * out_features * element_bytes;
    char* destination = static_cast<char*>(stored) + row * out_features * element_bytes;
    for_each_column(kind, out_features, [&](int64_t n, int64_t column) {
      std::memcpy(destination + column * element_bytes, source + n * element_bytes, size);
    });
  }
}

void unpermute_scale(const void* stored, ScaleKind kind, int64_t rows, int64_t out_features, int element_bytes,
                     void* natural) {
  const auto size = static_cast<size_t>(element_bytes);
  for (int64_t row = 0; row < rows; ++row) {
    const char* source = static_cast<const char*>(stored) + row * out_features * element_bytes;
    char* destination = static_cast<char*>(natural) + row * out_features * element_bytes;
    for_each_column(kind, out_features, [&](int64_t n, int64_t column) {
      std::memcpy(destination + n * element_bytes, source + column * element_bytes, size);
    });
  }
}

}  // namespace marlin_qqq::cpu
