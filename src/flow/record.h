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

extern bool redrive_record(RedriveChunk *chunk, RedriveInterval *interval, bool ends_chunk);

#endif							/* REDRIVE_RECORD_H */
