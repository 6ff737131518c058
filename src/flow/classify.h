/*-------------------------------------------------------------------------
 *
 * classify.h
 *	  What an error means for its item.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_CLASSIFY_H
#define REDRIVE_CLASSIFY_H

#include "flow/batch.h"

extern RedriveFailure *redrive_classify(RedriveChunk *chunk, RedriveItem *item, ErrorData *error);
extern RedriveFailure *redrive_judge_outcome(RedriveChunk *chunk, RedriveItem *item, RedriveOutcome *outcome);
extern bool redrive_is_transient(RedriveChunk *chunk, ErrorData *error);
extern bool redrive_settle_failure(RedriveChunk *chunk, RedriveInterval *interval, RedriveSlot *slot,
								   int k, ErrorData *error);
extern RedriveFailure *redrive_quarantine(RedriveItem *item);
extern void redrive_count_rule_hits(RedriveChunk *chunk);

#endif							/* REDRIVE_CLASSIFY_H */
