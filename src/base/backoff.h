/*-------------------------------------------------------------------------
 *
 * backoff.h
 *	  Delays between attempts.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_BACKOFF_H
#define REDRIVE_BACKOFF_H

extern int64 redrive_backoff(int64 base_us, double factor, int64 max_us,
							 int attempt, uint64 seed);

#endif							/* REDRIVE_BACKOFF_H */
