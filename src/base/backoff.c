/*-------------------------------------------------------------------------
 *
 * backoff.c
 *	  Delays between attempts.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <math.h>

#include "common/hashfn.h"

#include "base/backoff.h"

/*
 * Return the delay in microseconds before the next attempt:
 * min(max, base * factor^attempt), less up to a tenth.
 *
 * The jitter is a function of seed and attempt: the same item always gets the
 * same delay, items that failed together come back spread out.  It only
 * shortens, so max is never exceeded.
 */
int64
redrive_backoff(int64 base_us, double factor, int64 max_us, int attempt, uint64 seed)
{
	double		delay = base_us * pow(factor, attempt);
	uint64		hash = hash_bytes_extended((unsigned char *) &seed, sizeof(seed),
										   (uint64) attempt);

	if (!(delay < max_us))		/* also when the power overflowed */
		delay = max_us;
	return (int64) (delay * (1.0 - 0.1 * (hash % 1000) / 1000.0));
}
