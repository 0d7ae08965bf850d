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
using format::kWordsPerTile;

}  // namespace

void pack_weight(const int8_t* codes, int64_t in_features, int64_t out_features, bool grouped, int32_t* packed,
                 int num_threads) {
  const int64_t words_per_row = 2 * out_features;
  auto pack_row = [&](int64_t row) {
    for (int64_t word = 0; word < words_per_row; ++word) {
      uint32_t value = 0;
      for (int nibble = 0; nibble < 8; ++nibble) {
        const auto position = format::weight_position(row, word, nibble, grouped);
        const int code = codes[position.in_feature * out_features + position.out_feature];
        value |= format::encode_nibble(code, grouped) << (4 * nibble);
      }
      packed[row * words_per_row + word] = static_cast<int32_t>(value);
    }
  };
  parallel_for(in_features / kTileInFeatures, num_threads, pack_row);
}

void unpack_weight(const int32_t* packed, int64_t in_features, int64_t out_features, bool grouped, int8_t* codes,
                   int num_threads) {
  const int64_t words_per_row = 2 * out_features;
  auto unpack_row = [&](int64_t row) {
    for (int64_t word = 0; word < words_per_row; ++word) {
      const auto value = static_cast<uint32_t>(packed[row * words_per_row + word]);
      for (int nibble = 0; nibble < 8; ++nibble) {
        const auto position = format::weight_position(row, word, nibble, grouped);
        codes[position.in_feature * out_features + position.out_feature] =
            static_cast<int8_t>(format::decode_nibble(value >> (4 * nibble), grouped));
      }
    }
  };
  parallel_for(in_features / kTileInFeatures, num_threads, unpack_row);
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
