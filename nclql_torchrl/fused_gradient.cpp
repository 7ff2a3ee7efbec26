// An ensemble's values and their gradients with respect to the action, for blocks of rows that stay in a core's cache
// through all layers, up and down. Built and loaded by fused_gradient.py.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using Vec = at::vec::Vectorized<float>;

// With fewer rows the products read weights more often than they use them, with more the block leaves the cache.
constexpr int64_t kLeastRows = 16;
constexpr int64_t kMostRows = 64;

void store(const Vec& x, float* to) {
  x.store(to);
}

void store(const Vec& x, at::BFloat16* to) {
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
  // What torch's headers write out as ten instructions.
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
#else
  at::vec::convert<at::BFloat16>(x).store(to, Vec::size());
#endif
}

// mish.py explains the formula. The exponential errs by at most 20 units in the last place, or, where bfloat16 comes
// next, by a hundredth of its precision.
template <typename Operand>
std::pair<Vec, Vec> mish_with_slope(const Vec& x) {
  const Vec bounded = at::vec::minimum(x, Vec(20.0f));
  const Vec e = std::is_same_v<Operand, float> ? bounded.exp_u20() : bounded.fexp_u20();
  const Vec n = e * (e + Vec(2.0f));
  const Vec r = (n + Vec(2.0f)).reciprocal();
  const Vec t = n * r;
  return {x * t, t + Vec(4.0f) * x * e * (e + Vec(1.0f)) * r * r};
}

// One critic's weights.
template <typename Operand>
struct Critic {
  const float *level_features, *action_up, *action_down, *output_weight;
  float output_bias;
  std::vector<const Operand *> up, down;
  std::vector<const float*> biases;
};

// Widths of the hidden layers, and memory for a block of rows.
template <typename Operand>
struct Block {
  const std::vector<int64_t>& widths;
  int64_t action_dim;
  int64_t plane;     // numbers of a block in the widest layer
  float* product;    // what a matrix product returns
  float* slopes;     // of every hidden layer but the last, a plane each
  Operand* operand;  // what the next product is given

  // product = operand * weight, [inner, columns].
  void multiply(int64_t rows, int64_t inner, int64_t columns, const Operand* weight) {
    // bfloat16 weights come in pairs of rows, as the processor's instruction takes them.
    constexpr bool in_pairs = !std::is_same_v<Operand, float>;
    at::native::cpublas::brgemm(
        rows, columns, inner, inner, columns, columns, false, operand, weight, product, in_pairs);
  }

  // The same with the transpose of the weight: for a single row, where reading a second copy would take longer.
  void multiply_by_transpose(int64_t rows, int64_t inner, int64_t columns, const float* transpose) {
    for (int64_t row = 0; row < rows; row++) {
      for (int64_t column = 0; column < columns; column++) {
        Vec sum(0.0f);
        for (int64_t index = 0; index < inner; index += Vec::size()) {
          const Vec weight = Vec::loadu(transpose + column * inner + index);
          sum = at::vec::fmadd(Vec::loadu(operand + row * inner + index), weight, sum);
        }
        product[row * columns + column] = sum.reduce_add();
      }
    }
  }

  // features: [rows, widths[0]]; action, gradient: [rows, action_dim]; value: [rows].
  void run(
      int64_t rows, const Critic<Operand>& critic, const float* features, const float* action, float* value,
      float* gradient) {
    const int64_t last = static_cast<int64_t>(widths.size()) - 1;
    at::native::cpublas::brgemm(
        rows, widths[0], action_dim, action_dim, widths[0], widths[0], false, action, critic.action_up, product, false);
    for (int64_t layer = 0; layer <= last; layer++) {
      const int64_t width = widths[layer];
      if (layer > 0) {
        multiply_up(rows, widths[layer - 1], width, critic, layer - 1);
      }
      const float* bias = layer == 0 ? critic.level_features : critic.biases[layer - 1];
      float* slope = slopes + layer * plane;
      for (int64_t row = 0; row < rows; row++) {
        Vec sum(0.0f);
        for (int64_t column = 0; column < width; column += Vec::size()) {
          const int64_t index = row * width + column;
          Vec x = Vec::loadu(product + index) + Vec::loadu(bias + column);
          if (layer == 0) {
            x = x + Vec::loadu(features + index);
          }
          const auto [activated, its_slope] = mish_with_slope<Operand>(x);
          if (layer == last) {
            const Vec weight = Vec::loadu(critic.output_weight + column);
            sum = at::vec::fmadd(activated, weight, sum);
            put_delta(weight * its_slope, index, last);
          } else {
            store(activated, operand + index);
            its_slope.store(slope + index);
          }
        }
        if (layer == last) {
          value[row] = sum.reduce_add() + critic.output_bias;
        }
      }
    }
    for (int64_t layer = last - 1; layer >= 0; layer--) {
      multiply(rows, widths[layer + 1], widths[layer], critic.down[layer]);
      const float* slope = slopes + layer * plane;
      for (int64_t index = 0; index < rows * widths[layer]; index += Vec::size()) {
        put_delta(Vec::loadu(product + index) * Vec::loadu(slope + index), index, layer);
      }
    }
    at::native::cpublas::brgemm(
        rows, action_dim, widths[0], widths[0], action_dim, action_dim, false, product, critic.action_down, gradient,
        false);
  }

  void multiply_up(int64_t rows, int64_t inner, int64_t columns, const Critic<Operand>& critic, int64_t layer) {
    if constexpr (std::is_same_v<Operand, float>) {
      if (critic.up.empty()) {
        multiply_by_transpose(rows, inner, columns, critic.down[layer]);
        return;
      }
    }
    multiply(rows, inner, columns, critic.up[layer]);
  }

  // The gradient with respect to what entered a layer's mish: an operand, but of the action's product, a float32 one.
  void put_delta(const Vec& delta, int64_t index, int64_t layer) {
    if (layer == 0) {
      delta.store(product + index);
    } else {
      store(delta, operand + index);
    }
  }
};

template <typename Operand>
void run(
    const Tensor& action, const Tensor& observation_features, const Tensor& level_features, const Tensor& action_up,
    const Tensor& action_down, const std::vector<Tensor>& up, const std::vector<Tensor>& down,
    const std::vector<Tensor>& biases, const Tensor& output_weight, const Tensor& output_bias, Tensor& values,
    Tensor& gradients) {
  const int64_t num_critics = observation_features.size(0), batch = observation_features.size(1);
  const int64_t action_dim = action.size(1), layers = static_cast<int64_t>(down.size());
  std::vector<int64_t> widths{observation_features.size(2)};
  for (const Tensor& weight : down) {
    widths.push_back(weight.size(1));
  }
  const int64_t widest = *std::max_element(widths.begin(), widths.end());

  std::vector<Critic<Operand>> critics;
  for (int64_t index = 0; index < num_critics; index++) {
    const auto of = [index](const Tensor& tensor) {
      return tensor.const_data_ptr<float>() + index * tensor.stride(0);
    };
    critics.push_back({of(level_features), of(action_up), of(action_down), of(output_weight), *of(output_bias), {}, {}, {}});
    for (int64_t layer = 0; layer < layers; layer++) {
      if (!up.empty()) {
        critics.back().up.push_back(up[layer].const_data_ptr<Operand>() + index * up[layer].stride(0));
      }
      critics.back().down.push_back(down[layer].const_data_ptr<Operand>() + index * down[layer].stride(0));
      critics.back().biases.push_back(of(biases[layer]));
    }
  }

  // Every thread has the blocks of one critic, as far as possible: its weights fit into the core's cache.
  const int64_t share = (num_critics * batch + at::get_num_threads() - 1) / at::get_num_threads();
  const int64_t block_rows = std::clamp(share, kLeastRows, kMostRows);
  const int64_t blocks = (batch + block_rows - 1) / block_rows;
  at::parallel_for(0, num_critics * blocks, 1, [&](int64_t begin, int64_t end) {
    // Kept, because for a single state allocating takes as long as computing.
    thread_local Tensor memory;
    const int64_t plane = block_rows * widest;
    if (!memory.defined() || memory.numel() < (layers + 2) * plane) {
      memory = at::empty({(layers + 2) * plane}, at::kFloat);
    }
    float* product = memory.data_ptr<float>();
    Operand* operand = reinterpret_cast<Operand*>(product + (layers + 1) * plane);
    Block<Operand> block{widths, action_dim, plane, product, product + plane, operand};
    for (int64_t index = begin; index < end; index++) {
      const int64_t critic = index / blocks, first = index % blocks * block_rows;
      const int64_t rows = std::min(block_rows, batch - first), place = critic * batch + first;
      block.run(
          rows, critics[critic], observation_features.const_data_ptr<float>() + place * widths[0],
          action.const_data_ptr<float>() + first * action_dim, values.data_ptr<float>() + place,
          gradients.data_ptr<float>() + place * action_dim);
    }
    at::native::cpublas::brgemm_release(!std::is_same_v<Operand, float>);
  });
}

std::vector<Tensor> contiguous(at::TensorList tensors) {
  std::vector<Tensor> result;
  for (const Tensor& tensor : tensors) {
    result.push_back(tensor.contiguous());
  }
  return result;
}

// fused_gradient.py describes arguments and results.
std::tuple<Tensor, Tensor> fused_gradient(
    const Tensor& action, const Tensor& observation_features, const Tensor& level_features, const Tensor& action_up,
    const Tensor& action_down, at::TensorList up, at::TensorList down, at::TensorList biases,
    const Tensor& output_weight, const Tensor& output_bias) {
  TORCH_CHECK(
      action.dim() == 2 && observation_features.dim() == 3 && observation_features.size(1) == action.size(0),
      "action has shape ", action.sizes(), " and observation_features ", observation_features.sizes(),
      "; expected [batch, action_dim] and [num_critics, batch, hidden].");
  const bool has_up = !up.empty();
  TORCH_CHECK(
      !down.empty() && biases.size() == down.size() && (!has_up || up.size() == down.size()), "up, down and biases have ",
      up.size(), ", ", down.size(), " and ", biases.size(),
      " layers; expected equally many, at least one, or none of up alone.");
  TORCH_CHECK(has_up || down[0].scalar_type() == at::kFloat, "down is ", down[0].scalar_type(),
      " and up empty; expected float32 where there is no up.");
  int64_t width = observation_features.size(2);
  for (size_t layer = 0; layer < down.size(); layer++) {
    const int64_t next = down[layer].size(1);
    TORCH_CHECK(
        width % Vec::size() == 0 && next % Vec::size() == 0 && down[layer].size(2) == width &&
            (!has_up || (up[layer].size(1) == width && up[layer].size(2) == next)),
        "down has shape ", down[layer].sizes(), " at hidden layer ", layer + 1, "; expected [num_critics, outputs, ", width,
        "], and up the transpose, with widths that ", Vec::size(), " divides.");
    width = next;
  }
  const auto options = observation_features.options();
  Tensor values = at::empty({observation_features.size(0), action.size(0)}, options);
  Tensor gradients = at::empty({observation_features.size(0), action.size(0), action.size(1)}, options);
  const auto run_with = down[0].scalar_type() == at::kBFloat16 ? run<at::BFloat16> : run<float>;
  run_with(
      action.contiguous(), observation_features.contiguous(), level_features.contiguous(), action_up.contiguous(),
      action_down.contiguous(), contiguous(up), contiguous(down), contiguous(biases), output_weight.contiguous(),
      output_bias.contiguous(), values, gradients);
  return {values, gradients};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(nclql_torchrl, library) {
  library.def(
      "fused_gradient(Tensor action, Tensor observation_features, Tensor level_features, Tensor action_up, "
      "Tensor action_down, Tensor[] up, Tensor[] down, Tensor[] biases, Tensor output_weight, Tensor output_bias) "
      "-> (Tensor, Tensor)");
  library.impl("fused_gradient", c10::DispatchKey::CPU, &fused_gradient);
}
