/*-------------------------------------------------------------------------
 *
 * build.h
 *	  Bodies of pushes that a platform's build function makes.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_BUILD_H
#define REDRIVE_BUILD_H

#include "base/shmem.h"

extern bool redrive_run_due_builds(RedriveSlot *slot, Oid owner);
extern char *redrive_built_body(Datum result, bool isnull, MemoryContext cxt);

#endif							/* REDRIVE_BUILD_H */
