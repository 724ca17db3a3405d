// All formulas.
#pragma once

#include "importance.h"
#include "list.h"
#include "sample.h"
