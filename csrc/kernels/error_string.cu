// Text of an error code.
#include "fastpo.h"
#include "port/port.h"

namespace fastpo::FASTPO_BACKEND {

const char* error_string(int code) { return error_text(code); }

}  // namespace fastpo::FASTPO_BACKEND
