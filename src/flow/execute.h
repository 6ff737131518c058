/*-------------------------------------------------------------------------
 *
 * execute.h
 *	  The engine: run what is due for a role.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_EXECUTE_H
#define REDRIVE_EXECUTE_H

#include "flow/batch.h"

extern bool redrive_execute_next(RedriveSlot *slot, Oid owner, MemoryContext cxt, TimestampTz deadline);

#endif							/* REDRIVE_EXECUTE_H */
