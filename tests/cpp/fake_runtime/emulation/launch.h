// Found before the emulation's own launch.h: its kernels, launched by the fake runtime.
#pragma once

#include "cuda/launch_cuda.h"
