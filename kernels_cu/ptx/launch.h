// Programmatic dependent launch: a kernel starts while the one before it is still running.
// PTX ISA, "griddepcontrol".
#pragma once
#include "core/types.h"

namespace mla {

// Until every kernel this one depends on has finished and its writes are visible. Returns at once in an ordinary launch.
MLA_DEVICE void pdl_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the next kernel start once all CTAs have said this (or left). It says nothing about memory.
MLA_DEVICE void pdl_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

}  // namespace mla
