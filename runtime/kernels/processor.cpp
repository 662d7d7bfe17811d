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

// Whether a processor multiplies tiles of bytes (AMX), as torch's products do and these kernels do not.
extern "C" bool has_tiles() {
#ifdef __AMX_INT8__
  return true;
#else
  return false;
#endif
}
