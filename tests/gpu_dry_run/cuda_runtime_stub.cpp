// The functions of the CUDA runtime that the planner refers to, as a Hopper GPU would answer.

#include <cstddef>

extern "C" {

int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}

int cudaDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 16:  // cudaDevAttrMultiProcessorCount
      *value = 132;
      return 0;
    case 75:  // cudaDevAttrComputeCapabilityMajor
      *value = 9;
      return 0;
    case 76:  // cudaDevAttrComputeCapabilityMinor
      *value = 0;
      return 0;
    case 81:  // cudaDevAttrMaxSharedMemoryPerMultiprocessor
      *value = 233472;
      return 0;
    case 97:  // cudaDevAttrMaxSharedMemoryPerBlockOptin
      *value = 232448;
      return 0;
    default:
      return 1;  // cudaErrorInvalidValue
  }
}

// The plan stays in the pinned buffer: there is no device to copy it to.
int cudaMemcpyAsync(void*, const void*, size_t, int, void*) { return 0; }

const char* cudaGetErrorString(int) { return "an error of the stub"; }
int cudaGetLastError() { return 0; }
int cudaPeekAtLastError() { return 0; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction() {}
void __cudaRegisterVar() {}
}
