/*-------------------------------------------------------------------------
 *
 * segment.h
 *	  Run items in a subtransaction.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_SEGMENT_H
#define REDRIVE_SEGMENT_H

#include "access/tupdesc.h"

#include "base/crumbs.h"
#include "flow/batch.h"
#include "flow/handler.h"

/* What a segment did. */
typedef struct SegmentResult
{
	int			reached;		/* good up to here (exclusive), when error is
								 * NULL */
	int			failed;			/* page index of the item that failed, -1 =
								 * not known */
	ErrorData  *error;			/* NULL = no item failed */
	bool		handler_gone;	/* its function or owner was dropped under our
								 * hands: no item's fault */
	bool		bad_outcome;	/* the set handler is wrong about its items */
} SegmentResult;

/*
 * Bits of the security context beside those of the server: that code of users
 * runs, and that it is a deferred trigger.  Like those they are passed on to
 * what is called, and go away with a (sub)transaction that is rolled back.
 */
#define USER_CODE_CONTEXT 0x4000
#define DEFERRED_CONTEXT 0x8000

/* Identity and settings around code of users. */
typedef struct UserCode
{
	Oid			user;
	int			context;
	int			nestlevel;
} UserCode;

/* The cache of a backend has room for 64; beyond it everybody gets slower. */
#define MAX_LIVE_SUBXACTS 50

/* A function prepared to be called for many items. */
typedef struct RedriveCall
{
	RedriveChunk *chunk;
	RedriveSlot *slot;
	FmgrInfo	flinfo;
	FunctionCallInfo fcinfo;
	TupleDesc	item_desc;		/* of redrive.item, if the signature has it */
	MemoryContext item_cxt;		/* reset for each call */
	TupleDesc	outcome_desc;	/* of redrive.outcome, if a set handler
								 * returns that */
	int			n_outcomes;		/* of the last call */
	RedriveOutcome *outcomes;
	bool		judging;		/* an error is about the outcomes, and of no
								 * item */
} RedriveCall;

extern RedriveCall *redrive_prepare_call(RedriveChunk *chunk, RedriveSlot *slot);
extern Datum redrive_item_datum(RedriveCall *call, RedriveItem *item);
extern void redrive_run_segment(RedriveCall *call, RedriveInterval *interval,
								int from, int to, SegmentResult *result);
extern bool redrive_run_callbacks(const char *function, CallbackKind kind, int64 timeout_us, int n, Datum *args,
								  CrumbKind crumb, int64 *ids, char **body, ErrorData **error);

extern int	redrive_live_subxacts(void);
extern void redrive_arm_stop(void);
extern void redrive_disarm_stop(void);
extern void redrive_enter_user_code(UserCode *save);
extern void redrive_leave_user_code(UserCode *save);
extern void redrive_init_timeouts(bool in_worker);
extern bool redrive_stop_requested(void);
extern void redrive_request_stop(SIGNAL_ARGS);

#endif							/* REDRIVE_SEGMENT_H */
