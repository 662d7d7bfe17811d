// What this processor computes with, asked before larger libraries are compiled.
#include "vectors.h"

// How many sums of 32 bits a vector of products of codes has; 0: there are no such kernels.
extern "C" int get_lanes() {
#ifdef HAS_VECTORS
  return LANES;
#else
  return 0;
#endif
}
