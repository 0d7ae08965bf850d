// Which launches of a captured graph stand alone, from what the capture says before and after each. Free of CUDA.
#pragma once

namespace marlin_qqq::cuda {

// What a capture says of its stream. Inactive: nothing is captured, or the stream does not say.
struct Capture {
  bool active = false;
  unsigned long long id = 0;   // of the capture: no other one of the process has it
  const void* last = nullptr;  // the one node that the stream's next node comes after; null: none, or several
};

// Of one host thread. It remembers our last launch that a graph has captured: where a thread goes on with several
// captures or streams in turns, each finds another's launch there, and its next one counts as standing alone.
class LaunchOrder {
 public:
  // Before a launch: whether what comes before it is not one of our launches, or is a quantisation of activations that
  // itself comes after none. False where that is not known.
  bool stands_alone(const Capture& capture) const {
    if (!capture.active) return false;
    const bool follows_ours = capture.last != nullptr && capture.last == node_ && capture.id == capture_;
    return !follows_ours || next_stands_alone_;
  }

  // After a launch. `next_stands_alone`: of a quantisation that does, whose product is a part of the same layer.
  void remember(const Capture& capture, bool next_stands_alone) {
    if (!capture.active) return;
    capture_ = capture.id;
    node_ = capture.last;
    next_stands_alone_ = next_stands_alone;
  }

 private:
  unsigned long long capture_ = 0;
  const void* node_ = nullptr;
  bool next_stands_alone_ = false;
};

}  // namespace marlin_qqq::cuda
