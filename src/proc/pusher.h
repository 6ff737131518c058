/*-------------------------------------------------------------------------
 *
 * pusher.h
 *	  The process that pushes the states of tasks to platforms.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_PUSHER_H
#define REDRIVE_PUSHER_H

#include "postgres.h"

#include "base/shmem.h"

extern long redrive_start_pusher(RedriveDatabase *entry, MemoryContext cxt);
extern PGDLLEXPORT void redrive_pusher_main(Datum arg);
extern bool redrive_enter_pusher(void);

#endif							/* REDRIVE_PUSHER_H */
