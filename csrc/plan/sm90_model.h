// The constants of the Hopper planner's cost model (sm90_candidates.cpp), fitted to measured times. To fit them to
// another GPU: benchmarks/tune_planner.py, which rewrites the values below and the line that says where they come from.
#pragma once

namespace marlin_qqq::plan {

// Cycles are of the device's nominal clock; a rate is a multiprocessor's unless it says otherwise.
// Fitted on NVIDIA H100 80GB HBM3 and NVIDIA H200: 3,032 problems, 24,764 candidates, mean loss 0.7%.
struct Sm90Model {
  // int8 products of wgmma, a cycle
  double macs_per_cycle = 3688;
  // the same of a warpgroup alone, of two that take turns
  double turn_macs_per_cycle = 3762;
  // bytes from L2 into shared memory, a cycle. This one and the two fractions of the memory bus's rate below are what
  // fits the times best, not what the device does.
  double feed_bytes_per_cycle = 3956;
  // cycles that dequantise an output feature's 128 inputs, per-channel and with group scales
  double channel_dequant_cycles = 2.679;
  double group_dequant_cycles = 3.811;
  // order of the norm that joins these three, per-channel and with group scales, and with them where all warpgroups
  // have one ring: how well the units overlap, the larger, the better
  double channel_unit_norm = 6.781;
  double group_unit_norm = 1.899;
  double shared_ring_group_unit_norm = 6.636;

  // cycles that a ring's stage takes at least, however idle the multiprocessor is
  double channel_stage_latency = 330.5;
  double group_stage_latency = 530.9;
  // more of them where a warpgroup has two products of 64 features
  double channel_product_latency = 1.358;
  double group_product_latency = 418.2;
  // the same for the rings of single warps, which take all of a tile's features
  double warp_channel_stage_latency = 904.6;
  double warp_group_stage_latency = 1524;
  // more of them for every further eight tokens
  double warp_channel_octet_latency = 207.8;
  double warp_group_octet_latency = 117.6;
  // part of the work on a stage that is done while the launch before ends, where it is dequantised early, and of that
  // part what is left where not all blocks of a launch find room beside the one before
  double ahead_fraction = 0.5387;
  double ahead_unfit_fraction = 0.33;
  // part of these cycles that a stage takes where four warps share a block, of two on a multiprocessor, per-channel and
  // with group scales
  double four_warps_channel_fraction = 1.003;
  double four_warps_group_fraction = 0.9968;
  // what dequantisation costs single warps' rings, against others, and warpgroups with two products of 64 features
  double warp_dequant_fraction = 0.6648;
  double two_products_dequant_fraction = 0.9683;
  // and more cycles a stage for every token and 64 features of the tile
  double stage_latency_per_token = 1.896;
  // these cycles where a warp of its own fills the ring, against rings that those who multiply fill, per-channel and
  // with group scales
  double shared_ring_channel_fraction = 0.6574;
  double shared_ring_group_fraction = 0.9878;
  // cycles from a stage's request to its arrival: a ring has all its stages on their way at most
  double memory_latency = 2842;
  // order of the norm that joins the stages' latency with the units' work
  double latency_norm = 9.407;

  // cycles of a launch: first bytes to arrive, barriers, the last store
  double launch_cycles = 1112;
  // cycles of it that are hidden where the next launch's blocks find multiprocessors of their own; where only a part of
  // them does, this fraction of those cycles times that power of the part
  double neighbour_cycles = 2416;
  double unfit_fraction = 0.6917;
  double unfit_power = 0.3137;
  // part of all that is hidden so without constant weights, and where four warps share a block
  double neighbour_exposed_fraction = 0.7366;
  double four_warps_neighbour_exposed_fraction = 0.36;
  // more cycles that reduce a cluster of two blocks, and for every further block
  double cluster_reduction_cycles = 315.8;
  double cluster_reduction_per_block = 345.6;
  // bytes of sums that a block sends to the others of its cluster, a cycle
  double exchange_bytes_per_cycle = 11.72;
  // the same of blocks whose rings have sums of their own
  double depth_cluster_cycles = 1321;
  double depth_cluster_per_block = 55.47;
  double depth_exchange_bytes_per_cycle = 53.38;
  // Of launches without constant weights, or that stand alone, microseconds more for every further block of such a
  // cluster and where the clusters leave another launch no room, and fewer where two warpgroups' rings, or four warps',
  // share a block.
  double depth_exposed_us = 0.01541;
  double full_clusters_exposed_us = 0.06285;
  double two_rings_exposed_us = 0.04054;
  double four_warps_exposed_us = 0.004775;
  // Of eight single warps' rings a block, where a part of the next launch finds room, microseconds more, and without
  // constant weights besides.
  double warp_unfit_us = 0.3838;
  double warp_unfit_exposed_us = 0.08087;
  // Microseconds more for every round after the first, whose blocks start with empty rings: where two share a
  // multiprocessor, and where one has it alone.
  double two_blocks_round_us = 0.3316;
  double own_rings_round_us = 0.1804;
  // bytes of the rings' sums added up, a cycle, where they lie in the place of the stages, and beside them, those of
  // warpgroups' and of single warps' rings
  double reduction_bytes_per_cycle = 36.55;
  double apart_bytes_per_cycle = 51.53;
  double warp_apart_bytes_per_cycle = 417.4;
  // outputs of the last tile that are stored, a cycle
  double epilogue_outputs_per_cycle = 8.535;
  // cycles between a block's tiles, or around its only one; the same where its rings' sums are added
  double wave_cycles = 4140;
  double depth_wave_cycles = 3823;
  // more of them where a thread has more sums than those of 64 features and 256 tokens
  double large_wave_cycles = 1035;
  // the same between the tiles of warpgroups that take turns
  double turn_cycles = 238.3;
  // microseconds of the second, dependent launch that adds the sums in scratch
  double reduction_kernel_us = 1.63;
  // bytes of such sums written and read in L2 by the whole GPU, a microsecond
  double scratch_bytes_per_us = 4.602e6;
  // At the power limit, parts of its time: what a launch saves whose blocks share activations, by the bytes of a
  // product of 128 features; and what one whose warpgroups take turns loses, alone and where blocks share activations
  // (the fit, to an H200's rows of launches, says 0.035; an H100's lost 15 to 20 % more in a row: between the two).
  double multicast_power_saving = 0.04649;
  double turns_power_loss = 0.1648;
  double shared_turns_power_loss = 0.08;
  // part of its time that a block waits for each neighbour it shares activations with
  double multicast_penalty = 0.02887;

  // part of the memory bus's rate that a product reaches
  double bandwidth_fraction = 1.23;
  // order of the norm that joins the bytes' time with the multiprocessors', and where two blocks share one
  double bandwidth_norm = 1.903;
  double two_blocks_bandwidth_norm = 1.852;

  // Tiles whose rings flow on: cycles of a ring's stage, for the first eight tokens, per-channel and with group scales,
  // and for every further eight
  double flow_channel_stage_cycles = 845.1;
  double flow_group_stage_cycles = 2018;
  double flow_channel_octet_cycles = 359.2;
  double flow_group_octet_cycles = 365.6;
  // cycles between a block's tiles
  double flow_tile_cycles = 1819;
  // Of launches with constant weights, which fetch their first ones where blocks of the launch before are done: part of
  // the last round's idle time that is not lost for that.
  double flow_hidden_fraction = 0.5766;
  // cycles that clusters lose, whose blocks start together
  double flow_cluster_cycles = 1253;
  // Of launches that stand alone, microseconds that other tiles lose more: each of their blocks starts with empty
  // rings.
  double flow_alone_us = 0.6;
  // part of the memory bus's rate, and the order of the norm that joins the bytes' time with the multiprocessors'
  double flow_bandwidth_fraction = 1.207;
  double flow_bandwidth_norm = 2.992;
  // cycles of a launch
  double flow_launch_cycles = 3342;
};

inline constexpr Sm90Model kSm90Model{};

// Of launches that stand alone (Problem::standalone), as parts of whole layers. The constants of what overlaps do not
// count there.
// Fitted on NVIDIA H100 80GB HBM3: 894 problems, 10,357 candidates, mean loss 0.8%.
constexpr Sm90Model standalone_model() {
  Sm90Model model;
  model.feed_bytes_per_cycle = 116.1;
  model.channel_dequant_cycles = 2.696;
  model.group_dequant_cycles = 4.689;
  model.channel_unit_norm = 10.28;
  model.group_unit_norm = 4.138;
  model.shared_ring_group_unit_norm = 4.138;
  model.channel_stage_latency = 398.4;
  model.group_stage_latency = 683.6;
  model.channel_product_latency = 2.933;
  model.group_product_latency = 331.8;
  model.warp_channel_stage_latency = 269.6;
  model.warp_group_stage_latency = 1731;
  model.warp_channel_octet_latency = 353.7;
  model.warp_group_octet_latency = 540.2;
  model.four_warps_channel_fraction = 0.5751;
  model.four_warps_group_fraction = 0.5751;
  model.warp_dequant_fraction = 0.819;
  model.two_products_dequant_fraction = 1;
  model.stage_latency_per_token = 1.462;
  model.shared_ring_channel_fraction = 0.7313;
  model.shared_ring_group_fraction = 0.7313;
  model.memory_latency = 2398;
  model.latency_norm = 14.1;
  model.launch_cycles = 4045;
  model.cluster_reduction_cycles = 2387;
  model.cluster_reduction_per_block = 906.4;
  model.exchange_bytes_per_cycle = 9.567;
  model.depth_cluster_cycles = 2575;
  model.depth_cluster_per_block = 4.335;
  model.depth_exchange_bytes_per_cycle = 98.8;
  model.depth_exposed_us = 0.06895;
  model.full_clusters_exposed_us = 0.1926;
  model.two_rings_exposed_us = 0.5274;
  model.four_warps_exposed_us = 0.2192;
  model.two_blocks_round_us = 1.205;
  model.own_rings_round_us = 0;
  model.reduction_bytes_per_cycle = 20.45;
  model.apart_bytes_per_cycle = 24.65;
  model.warp_apart_bytes_per_cycle = 37.15;
  model.epilogue_outputs_per_cycle = 5.618;
  model.wave_cycles = 4941;
  model.depth_wave_cycles = 4319;
  model.reduction_kernel_us = 2.401;
  model.scratch_bytes_per_us = 6.152e6;
  model.multicast_penalty = 0.09079;
  model.bandwidth_fraction = 0.9238;
  model.bandwidth_norm = 2.529;
  model.two_blocks_bandwidth_norm = 2.529;
  model.flow_channel_stage_cycles = 1118;
  model.flow_group_stage_cycles = 2166;
  model.flow_channel_octet_cycles = 529.8;
  model.flow_group_octet_cycles = 461.2;
  model.flow_tile_cycles = 2276;
  model.flow_cluster_cycles = 1994;
  model.flow_alone_us = 0.2237;
  model.flow_bandwidth_fraction = 0.9298;
  model.flow_bandwidth_norm = 8.662;
  model.flow_launch_cycles = 7261;
  return model;
}

inline constexpr Sm90Model kSm90StandaloneModel = standalone_model();

constexpr const Sm90Model& sm90_model(bool standalone) { return standalone ? kSm90StandaloneModel : kSm90Model; }

// Every constant by its name, for the fit.
struct Sm90Constant {
  const char* name;
  double Sm90Model::*value;
};

inline constexpr Sm90Constant kSm90Constants[] = {
    {"macs_per_cycle", &Sm90Model::macs_per_cycle},
    {"turn_macs_per_cycle", &Sm90Model::turn_macs_per_cycle},
    {"feed_bytes_per_cycle", &Sm90Model::feed_bytes_per_cycle},
    {"channel_dequant_cycles", &Sm90Model::channel_dequant_cycles},
    {"group_dequant_cycles", &Sm90Model::group_dequant_cycles},
    {"channel_unit_norm", &Sm90Model::channel_unit_norm},
    {"group_unit_norm", &Sm90Model::group_unit_norm},
    {"shared_ring_group_unit_norm", &Sm90Model::shared_ring_group_unit_norm},
    {"channel_stage_latency", &Sm90Model::channel_stage_latency},
    {"group_stage_latency", &Sm90Model::group_stage_latency},
    {"channel_product_latency", &Sm90Model::channel_product_latency},
    {"group_product_latency", &Sm90Model::group_product_latency},
    {"warp_channel_stage_latency", &Sm90Model::warp_channel_stage_latency},
    {"warp_group_stage_latency", &Sm90Model::warp_group_stage_latency},
    {"warp_channel_octet_latency", &Sm90Model::warp_channel_octet_latency},
    {"warp_group_octet_latency", &Sm90Model::warp_group_octet_latency},
    {"ahead_fraction", &Sm90Model::ahead_fraction},
    {"ahead_unfit_fraction", &Sm90Model::ahead_unfit_fraction},
    {"four_warps_channel_fraction", &Sm90Model::four_warps_channel_fraction},
    {"four_warps_group_fraction", &Sm90Model::four_warps_group_fraction},
    {"warp_dequant_fraction", &Sm90Model::warp_dequant_fraction},
    {"two_products_dequant_fraction", &Sm90Model::two_products_dequant_fraction},
    {"stage_latency_per_token", &Sm90Model::stage_latency_per_token},
    {"shared_ring_channel_fraction", &Sm90Model::shared_ring_channel_fraction},
    {"shared_ring_group_fraction", &Sm90Model::shared_ring_group_fraction},
    {"memory_latency", &Sm90Model::memory_latency},
    {"latency_norm", &Sm90Model::latency_norm},
    {"launch_cycles", &Sm90Model::launch_cycles},
    {"neighbour_cycles", &Sm90Model::neighbour_cycles},
    {"unfit_fraction", &Sm90Model::unfit_fraction},
    {"unfit_power", &Sm90Model::unfit_power},
    {"neighbour_exposed_fraction", &Sm90Model::neighbour_exposed_fraction},
    {"four_warps_neighbour_exposed_fraction", &Sm90Model::four_warps_neighbour_exposed_fraction},
    {"cluster_reduction_cycles", &Sm90Model::cluster_reduction_cycles},
    {"cluster_reduction_per_block", &Sm90Model::cluster_reduction_per_block},
    {"exchange_bytes_per_cycle", &Sm90Model::exchange_bytes_per_cycle},
    {"depth_cluster_cycles", &Sm90Model::depth_cluster_cycles},
    {"depth_cluster_per_block", &Sm90Model::depth_cluster_per_block},
    {"depth_exchange_bytes_per_cycle", &Sm90Model::depth_exchange_bytes_per_cycle},
    {"depth_exposed_us", &Sm90Model::depth_exposed_us},
    {"full_clusters_exposed_us", &Sm90Model::full_clusters_exposed_us},
    {"two_rings_exposed_us", &Sm90Model::two_rings_exposed_us},
    {"four_warps_exposed_us", &Sm90Model::four_warps_exposed_us},
    {"warp_unfit_us", &Sm90Model::warp_unfit_us},
    {"warp_unfit_exposed_us", &Sm90Model::warp_unfit_exposed_us},
    {"two_blocks_round_us", &Sm90Model::two_blocks_round_us},
    {"own_rings_round_us", &Sm90Model::own_rings_round_us},
    {"reduction_bytes_per_cycle", &Sm90Model::reduction_bytes_per_cycle},
    {"apart_bytes_per_cycle", &Sm90Model::apart_bytes_per_cycle},
    {"warp_apart_bytes_per_cycle", &Sm90Model::warp_apart_bytes_per_cycle},
    {"epilogue_outputs_per_cycle", &Sm90Model::epilogue_outputs_per_cycle},
    {"wave_cycles", &Sm90Model::wave_cycles},
    {"depth_wave_cycles", &Sm90Model::depth_wave_cycles},
    {"large_wave_cycles", &Sm90Model::large_wave_cycles},
    {"turn_cycles", &Sm90Model::turn_cycles},
    {"reduction_kernel_us", &Sm90Model::reduction_kernel_us},
    {"scratch_bytes_per_us", &Sm90Model::scratch_bytes_per_us},
    {"multicast_power_saving", &Sm90Model::multicast_power_saving},
    {"turns_power_loss", &Sm90Model::turns_power_loss},
    {"shared_turns_power_loss", &Sm90Model::shared_turns_power_loss},
    {"multicast_penalty", &Sm90Model::multicast_penalty},
    {"bandwidth_fraction", &Sm90Model::bandwidth_fraction},
    {"bandwidth_norm", &Sm90Model::bandwidth_norm},
    {"two_blocks_bandwidth_norm", &Sm90Model::two_blocks_bandwidth_norm},
    {"flow_channel_stage_cycles", &Sm90Model::flow_channel_stage_cycles},
    {"flow_group_stage_cycles", &Sm90Model::flow_group_stage_cycles},
    {"flow_channel_octet_cycles", &Sm90Model::flow_channel_octet_cycles},
    {"flow_group_octet_cycles", &Sm90Model::flow_group_octet_cycles},
    {"flow_tile_cycles", &Sm90Model::flow_tile_cycles},
    {"flow_cluster_cycles", &Sm90Model::flow_cluster_cycles},
    {"flow_hidden_fraction", &Sm90Model::flow_hidden_fraction},
    {"flow_alone_us", &Sm90Model::flow_alone_us},
    {"flow_bandwidth_fraction", &Sm90Model::flow_bandwidth_fraction},
    {"flow_bandwidth_norm", &Sm90Model::flow_bandwidth_norm},
    {"flow_launch_cycles", &Sm90Model::flow_launch_cycles},
};
static_assert(sizeof(Sm90Model) == sizeof(double) * (sizeof(kSm90Constants) / sizeof(kSm90Constants[0])),
              "a constant without its name");

}  // namespace marlin_qqq::plan
