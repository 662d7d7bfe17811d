// What this processor computes with, asked before larger libraries are compiled.

extern "C" int has_vnni() {
#ifdef __AVX512VNNI__
  return 1;
#else
  return 0;
#endif
}
