/*-------------------------------------------------------------------------
 *
 * claim.h
 *	  Take a chunk, give it back.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_CLAIM_H
#define REDRIVE_CLAIM_H

#include "flow/batch.h"

extern RedriveChunk *redrive_claim(Oid owner, int64 hint, MemoryContext parent, bool *more, bool *callbacks);
extern void redrive_give_back(RedriveChunk *chunk, bool lost);
extern void redrive_fold(RedriveChunk *chunk);
extern void redrive_rescue(void);
extern bool redrive_fold_ended(void);

#endif							/* REDRIVE_CLAIM_H */
