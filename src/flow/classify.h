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
extern RedriveFailure *redrive_quarantine(RedriveItem *item);
extern void redrive_count_rule_hits(RedriveChunk *chunk);

#endif							/* REDRIVE_CLASSIFY_H */
