/*-------------------------------------------------------------------------
 *
 * crumbs.h
 *	  What each worker executes, in a file that survives a crash.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_CRUMBS_H
#define REDRIVE_CRUMBS_H

#include "datatype/timestamp.h"
#include "fmgr.h"

typedef enum CrumbKind
{
	CRUMB_NONE,					/* no code of users runs */
	CRUMB_ITEM,					/* id = item_no */
	CRUMB_SEGMENT,				/* several items at once, as a set or by their
								 * deferred constraints and unlocks; id = the
								 * last item_no */
	CRUMB_UNLOCK,				/* on_unlock of an item; id = item_no */
	CRUMB_CALLBACK,				/* id = callback_id */
	CRUMB_BUILD,				/* a build function; id = push_id */
	/* verdicts only */
	CRUMB_INNOCENT,				/* taken down because of another process */
	CRUMB_SUSPECT,				/* the whole server was killed: id = the item
								 * that ran */
	CRUMB_UNKNOWN				/* the file was lost */
} CrumbKind;

/*
 * One worker slot.  Written by its process alone, by plain stores; volatile, so
 * that the compiler keeps their order.
 */
typedef struct RedriveCrumb
{
	uint32		kind;			/* CrumbKind */
	uint32		stamped;		/* the postmaster told this process to quit */
	Oid			database;
	uint32		unused;
	int64		batch_id;
	int64		chunk_id;		/* 0 = in no chunk */
	int64		lease_token;
	int64		id;				/* being executed, 0 = none */
	TimestampTz crashed_at;		/* of a verdict: start of the next server */
	int64		unused_too;		/* 64 bytes: a cache line for each worker */
} RedriveCrumb;

/* That of this process; one that nobody reads when there is no file. */
extern volatile RedriveCrumb *redrive_crumb;

extern void redrive_judge_crumbs(void);
extern void redrive_attach_crumb(int slot, Oid database);
extern void redrive_detach_crumb(int slot);
extern void redrive_forget_crumbs(Oid database);

#endif							/* REDRIVE_CRUMBS_H */
