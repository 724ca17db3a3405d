// All terms.
#pragma once

#include "bernoulli.h"
#include "gaussian.h"
#include "gaussian_kl.h"
#include "list.h"
