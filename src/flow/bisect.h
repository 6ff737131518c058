/*-------------------------------------------------------------------------
 *
 * bisect.h
 *	  Set handlers: how many items a call gets, and what follows when it fails.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_BISECT_H
#define REDRIVE_BISECT_H

#include "flow/segment.h"

extern int	redrive_call_length(RedriveChunk *chunk, RedriveInterval *interval);
extern void redrive_run_set(RedriveCall *call, RedriveChunk *chunk, RedriveInterval *interval,
							RedriveSlot *slot, int to);

#endif							/* REDRIVE_BISECT_H */
