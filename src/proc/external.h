/*-------------------------------------------------------------------------
 *
 * external.h
 *	  What a supervisor does for external workers.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_EXTERNAL_H
#define REDRIVE_EXTERNAL_H

#include "base/shmem.h"

extern bool redrive_external_begin(RedriveDatabase *entry);
extern void redrive_external_fold(RedriveDatabase *entry);
extern TimestampTz redrive_external_look(TimestampTz at);
extern long redrive_external_end(RedriveDatabase *entry, TimestampTz turn_at);

#endif							/* REDRIVE_EXTERNAL_H */
