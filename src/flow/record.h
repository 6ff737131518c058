/*-------------------------------------------------------------------------
 *
 * record.h
 *	  Write down what a commit interval did, in its own transaction.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_RECORD_H
#define REDRIVE_RECORD_H

#include "flow/batch.h"

extern void redrive_store_failures(RedriveChunk *chunk, int n, RedriveFailure **failures);
extern void redrive_note_waiting(int64 batch_id, TimestampTz next_retry_at, TimestampTz oldest);
extern bool redrive_record(RedriveChunk *chunk, RedriveInterval *interval, bool ends_chunk);

#endif							/* REDRIVE_RECORD_H */
