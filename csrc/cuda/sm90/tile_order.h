// In which order the clusters of a launch take its tiles.
#pragma once

#include <algorithm>

#include "cuda/common/divisor.h"
#include "format/host_device.h"

namespace marlin_qqq::cuda::sm90 {

// Clusters take works in turns, so about as many neighbouring ones run at a time as there is room for. They are a patch
// of the output: some tiles of tokens by some of features, so that few activations and few weights come to L2 for many
// products. One patch after the other of a band of tokens, so that its activations stay in L2; then the next band.
// Multiprocessors that are next to each other fetch what they share faster. So within a patch features come first, and
// neighbours share activations, or it is one tile of features wide, and they share weights.
struct TileOrder {
  static constexpr int kMostBandTokens = 8;

  int token_tiles;
  int feature_groups;  // tiles of features, by those that a cluster takes together
  int band_tokens;     // token tiles of a band; the last one may have fewer
  Divisor per_slice;   // works of one slice of the inputs,
  Divisor per_band;
  Divisor per_patch;
  Divisor per_last_patch;  // of the last band
  Divisor patch_row;       // feature groups of a patch,
  Divisor last_row;        // and of a band's last patch

  // `side_by_side`: clusters that run at a time.
  static TileOrder of(int token_tiles, int feature_groups, int side_by_side, bool features_first) {
    const int band = std::min(token_tiles, kMostBandTokens);
    const int row = features_first ? std::min(feature_groups, std::max(1, side_by_side / band)) : 1;
    const int last_band = token_tiles - (token_tiles - 1) / band * band;
    const int last_row = feature_groups - (feature_groups - 1) / row * row;
    return {token_tiles,
            feature_groups,
            band,
            Divisor::of(token_tiles * feature_groups),
            Divisor::of(band * feature_groups),
            Divisor::of(band * row),
            Divisor::of(last_band * row),
            Divisor::of(row),
            Divisor::of(last_row)};
  }

  struct Place {
    int slice;  // of the inputs, where clusters share a tile
    int token_tile;
    int feature_group;
  };

  MARLIN_QQQ_HOST_DEVICE Place place(int work) const {
    const auto [slice, in_slice] = per_slice.divide(work);
    const auto [band, in_band] = per_band.divide(in_slice);
    const Divisor& patch_size = (band + 1) * band_tokens <= token_tiles ? per_patch : per_last_patch;
    const auto [patch, in_patch] = patch_size.divide(in_band);
    const auto patch_features = static_cast<int>(patch_row.divisor);
    const Divisor& row_size = (patch + 1) * patch_features <= feature_groups ? patch_row : last_row;
    const auto [row, in_row] = row_size.divide(in_patch);
    return {slice, band * band_tokens + row, patch * patch_features + in_row};
  }
};

}  // namespace marlin_qqq::cuda::sm90
