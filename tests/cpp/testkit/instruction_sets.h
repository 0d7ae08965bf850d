// Runs a test once for every instruction set that the machine has.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace marlin_qqq::testkit {

inline std::vector<cpu::InstructionSet> supported_instruction_sets() {
  std::vector<cpu::InstructionSet> sets;
  for (const cpu::InstructionSet set :
       {cpu::InstructionSet::kGeneric, cpu::InstructionSet::kAvx2, cpu::InstructionSet::kAvxVnni,
        cpu::InstructionSet::kAvx512Vnni, cpu::InstructionSet::kNeonDotprod}) {
    if (cpu::is_supported(set)) {
      sets.push_back(set);
    }
  }
  return sets;
}

// Fixture: the parameter's instruction set while the test runs, the machine's choice afterwards.
class WithInstructionSet : public testing::TestWithParam<cpu::InstructionSet> {
 protected:
  void SetUp() override { ASSERT_TRUE(cpu::set_instruction_set(GetParam())); }
  void TearDown() override { ASSERT_TRUE(cpu::set_instruction_set(chosen_)); }

 private:
  cpu::InstructionSet chosen_ = cpu::instruction_set();
};

inline std::string instruction_set_of(const testing::TestParamInfo<cpu::InstructionSet>& info) {
  return cpu::instruction_set_name(info.param);
}

}  // namespace marlin_qqq::testkit
