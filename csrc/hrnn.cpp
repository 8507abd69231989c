// Packing of meta-parameters: once per set of them, so nothing here is fast.

#include "hrnn.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace lopt {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kGateScale = -kLog2E, kCandidateScale = -2 * kLog2E;

// Column of output `unit` of `gate` (0 reset, 1 update, 2 candidate) among the 30 that `Injected` holds.
int column(int gate, int unit) { return gate * kHidden + unit; }

double output_scale(int gate) { return gate < 2 ? kGateScale : kCandidateScale; }

// [in][reset | update | candidate] -> [in][kOutputs]
std::vector<float> pack_injection(const float* weight, int inputs) {
  std::vector<float> packed(inputs * Meta::kOutputs);
  for (int i = 0; i < inputs; i++)
    for (int gate = 0; gate < 3; gate++)
      for (int unit = 0; unit < kHidden; unit++)
        packed[i * Meta::kOutputs + column(gate, unit)] =
            output_scale(gate) * weight[(i * 3 + gate) * kHidden + unit];
  return packed;
}

// Weights of one output of the parameter GRU, [features + hidden] with `stride` -> one per input in the order of `Step::input`.
std::vector<double> pack_output(const Config& config, int gate, const float* weight, int stride) {
  const int features = config.products ? kFeatures : kProducts;
  std::vector<double> inputs(features + kHidden);
  double* feature = &inputs[gate == 2 ? 0 : kHidden];
  double* state = &inputs[gate == 2 ? features : 0];
  int index = 0;
  const auto next = [&] { return output_scale(gate) * weight[stride * index++]; };
  for (int s = 0; s < kTimescales; s++) feature[kScaled + s] = next();
  if (config.products)
    for (int s = 0; s + 1 < kTimescales; s++) feature[kProducts + s] = next();
  double log_ms[kTimescales], mean = 0;
  for (double& value : log_ms) mean += (value = next()) / kTimescales;
  for (int s = 0; s + 1 < kTimescales; s++) feature[kLogMs + s] = log_ms[s] - mean;
  feature[kRelativeLogLr] = next();
  for (int i = 0; i < kHidden; i++) state[i] = next();
  return inputs;
}

std::vector<float> copy(const float* from, int count) {
  return from ? std::vector<float>(from, from + count) : std::vector<float>();
}

}  // namespace

Meta pack(const Config& config, Find find, const void* context) {
  const auto get = [&](const char* name) { return find(context, name); };
  const auto scalar = [&](const char* name) { return double(*get(name)); };
  Meta meta{};
  meta.config = config;
  Weights<float>& w = meta.weights;

  float largest = 1;
  for (int i = 0; i < kHidden; i++) largest = std::max(largest, std::abs(get("level0.init")[i]));
  meta.hidden_limit = std::exp2(std::ceil(std::log2(largest)));

  for (int gate = 0; gate < 3; gate++) {
    const float* weight = gate < 2 ? get("level0.gates.weight") + gate * kHidden : get("level0.candidate.weight");
    const float* bias = gate < 2 ? get("level0.gates.bias") + gate * kHidden : get("level0.candidate.bias");
    for (int unit = 0; unit < kHidden; unit++) {
      const auto inputs = pack_output(config, gate, weight + unit, gate < 2 ? 2 * kHidden : kHidden);
      for (size_t i = 0; i < inputs.size(); i++) w.gru[gate * kGroups + unit / kColumns][i][unit % kColumns] = inputs[i];
      meta.bias[column(gate, unit)] = output_scale(gate) * bias[unit];
    }
  }

  const auto read_out = [&](const std::string& name, float* weight, double scale, float* shortcut) {
    const float* from = get((name + ".weight").c_str());
    for (int i = 0; i < kHidden; i++) weight[i] = from ? scale * from[i] : 0;
    if (shortcut && config.shortcut)
      for (int s = 0; s < kTimescales; s++) shortcut[s] = get((name + ".shortcut").c_str())[s];
  };
  read_out("direction", w.direction, 1, w.direction_shortcut);
  if (config.attention) read_out("attention", w.attention, 1, w.attention_shortcut);
  read_out("log_lr", w.log_lr, 1, nullptr);
  const auto decay = [&](Decay which, const std::string& name, double fixed) {
    float weight[kHidden];
    read_out(name, weight, kGateScale, nullptr);
    for (int i = 0; i < kHidden; i++) w.decay[i][which] = weight[i];
    const float* bias = get((name + ".bias").c_str());
    w.decay_bias[which] = kGateScale * (bias ? *bias : std::log(fixed / (1 - fixed)));
  };
  decay(kGrad, "grad_decay", config.fixed_grad_decay);
  decay(kScale, "scale_decay", config.fixed_scale_decay);
  w.log_lr_bias = scalar("log_lr.bias");
  w.momentum = 1 / (1 + std::exp(-scalar("log_lr.momentum")));
  w.log_lr_min = config.log_lr_min;
  w.log_lr_min_steps = config.log_lr_min_steps;
  w.log_lr_min_distance = config.log_lr_min_distance;
  w.log_lr_min_distance_limit = config.log_lr_min_distance_limit;
  w.log_lr_max = config.log_lr_max;
  w.log_lr_max_ratio = config.log_lr_max_ratio;
  w.log2_step_offset = scalar("log_step.offset") * kLog2E;
  w.attention_factor = std::exp(-scalar("log_step.offset"));
  w.ms_eps = config.ms_eps;
  w.rms_eps = config.rms_eps;
  w.moves_unseen = config.damping > 0 ? 0 : 1;

  const auto inject = [&](const std::string& name, int inputs) {
    if (!inputs) return std::vector<float>();
    const float* bias = get((name + ".bias").c_str());
    for (int gate = 0; gate < 3; gate++)
      for (int unit = 0; unit < kHidden; unit++)
        meta.bias[column(gate, unit)] += output_scale(gate) * bias[gate * kHidden + unit];
    return pack_injection(get((name + ".weight").c_str()), inputs);
  };
  meta.from_tensor = inject("level0.from_level1", config.tensor_size);
  meta.from_global = inject("level0.from_level2", config.global_size);

  const auto gru = [&](const std::string& name, int inputs, int size, int injected) {
    const auto part = [&](const char* suffix, int count) { return copy(get((name + suffix).c_str()), count); };
    if (!size) return Gru();
    return Gru{inputs, size,
               part(".gates.weight", (inputs + size) * 2 * size), part(".gates.bias", 2 * size),
               part(".candidate.weight", (inputs + size) * size), part(".candidate.bias", size),
               part(".from_level2.weight", injected * 3 * size), part(".from_level2.bias", injected ? 3 * size : 0)};
  };
  meta.tensor = gru("level1", kHidden + config.features(), config.tensor_size, config.global_size);
  meta.global = gru("level2", config.tensor_size, config.global_size, 0);
  return meta;
}

}  // namespace lopt
