// All formulas.
#pragma once

#include "bernoulli.h"
#include "gaussian.h"
#include "gaussian_kl.h"
#include "importance.h"
#include "list.h"
#include "sample.h"
