// Number formats of parameters and gradients; their values are those of DTYPES in lopt/backends/coverage.py.
#pragma once

namespace lopt {

enum class Dtype : int { f32, f64, bf16, f16 };

}  // namespace lopt
