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

/* After TURN_LOCKED: look again after so long. */
#define LOCKED_NAP_MS 50

/* What came of a turn. */
typedef enum RedriveTurn
{
	TURN_IDLE,					/* nothing is due: sleep until woken */
	TURN_LOCKED,				/* others have locked what is due, and may not
								 * tell when they let go of it */
	TURN_WORKED					/* go on */
} RedriveTurn;

extern RedriveTurn redrive_execute_next(RedriveSlot *slot, Oid owner, MemoryContext cxt, TimestampTz deadline);

#endif							/* REDRIVE_EXECUTE_H */
