/*-------------------------------------------------------------------------
 *
 * shmem.h
 *	  What processes know of each other: databases and worker slots.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_SHMEM_H
#define REDRIVE_SHMEM_H

#include "datatype/timestamp.h"
#include "port/atomics.h"
#include "storage/condition_variable.h"
#include "storage/latch.h"
#include "storage/lwlock.h"

#define REDRIVE_MAX_SLOTS 256

/* Those who wait for something to claim, by database and owner. */
#define REDRIVE_CLAIMER_GROUPS 32

typedef enum SlotState
{
	SLOT_FREE,					/* -> STARTING, or CLAIMING in the foreground */
	SLOT_STARTING,				/* registered, process not there yet ->
								 * CLAIMING, FREE */
	SLOT_CLAIMING,				/* looks for work -> RUNNING, CALLBACKS, IDLE,
								 * FREE */
	SLOT_RUNNING,				/* in a chunk -> CLAIMING, FREE */
	SLOT_CALLBACKS,				/* runs callbacks -> CLAIMING, FREE */
	SLOT_IDLE					/* waits for its latch -> CLAIMING, FREE */
} SlotState;

/*
 * A worker.  Plain data: written by its process alone after the start, read
 * by others without a lock where a torn set of values does no harm (views).
 */
typedef struct RedriveSlot
{
	SlotState	state;
	bool		foreground;		/* CALL redrive.work(), not an executor */
	bool		leave;			/* asked to exit: another role needs the place */
	bool		clean_exit;		/* the process ended as it should */
	uint32		generation;		/* +1 each time the slot is taken */
	pid_t		pid;
	Latch	   *latch;
	Oid			database;
	Oid			owner;			/* role it is connected as */
	TimestampTz started_at;
	int64		hint;			/* batch that a waker has made ready, 0 = none */
	int32		handler_id;
	int64		batch_id;
	int64		chunk_id;
	TimestampTz claimed_at;
	double		items_per_second;	/* of the running chunk */
	int64		open_succeeded; /* in the commit interval that is open */
	int64		open_failed;
	int64		item_no;		/* being executed, 0 = none */
	TimestampTz item_started_at;
} RedriveSlot;

/* A role whose executors end at once, for example because it cannot log in. */
#define REDRIVE_MAX_HELD_BACK 8

typedef struct RedriveHeldBack
{
	Oid			owner;
	TimestampTz until;			/* no executor before that; past = not held */
	int			times;			/* executors in a row that ended at once */
} RedriveHeldBack;

/* A database that may have the extension. */
typedef struct RedriveDatabase
{
	Oid			database;		/* InvalidOid = free entry */
	bool		present;		/* last seen with the extension */
	bool		probe;			/* the launcher shall (re)start a supervisor */
	pid_t		pid;			/* of the supervisor, 0 = none */
	Latch	   *latch;
	pid_t		pusher_pid;		/* 0 = none */
	Latch	   *pusher_latch;
	pid_t		kept_by;		/* session whose transaction needs the
								 * database to itself, 0 = none */
	TimestampTz retry_at;		/* not before this time, after an error */
	int			errors;			/* supervisors in a row that ended in one */
	TimestampTz wakes_at;		/* the supervisor sleeps until then; the end
								 * of time while it does not sleep */
	bool		fold_wanted;	/* an external worker ended a chunk */
	TimestampTz folds_at;		/* the supervisor will see then whether it is;
								 * the end of time if somebody has to wake it */
	bool		prepared;		/* a transaction that wakes was prepared */
	TimestampTz no_process_since;	/* a worker was wanted and there was no
									 * process for it; 0 = there was */
	RedriveHeldBack held_back[REDRIVE_MAX_HELD_BACK];	/* written by its
														 * supervisor alone */
} RedriveDatabase;

/*
 * What those sleep on who wait for something to claim.  A look may end with a
 * subtransaction that is rolled back, and that takes a backend off the condition
 * variable it is on; so what woke others meanwhile is seen by the count.
 */
typedef struct RedriveClaimers
{
	ConditionVariable sleepers;
	pg_atomic_uint64 woken;		/* how often, so far */
} RedriveClaimers;

typedef struct RedriveShared
{
	LWLock	   *lock;			/* protects everything below but slot details */
	pid_t		launcher_pid;
	Latch	   *launcher_latch;
	ConditionVariable batch_ended;	/* for redrive.wait() */
	RedriveClaimers claimers[REDRIVE_CLAIMER_GROUPS];	/* for claim() with wait */
	RedriveSlot slots[REDRIVE_MAX_SLOTS];
	RedriveDatabase databases[FLEXIBLE_ARRAY_MEMBER];	/* max_databases of them */
} RedriveShared;

extern RedriveShared *redrive_shared;	/* NULL when not preloaded */

extern void redrive_install_shmem_hooks(void);
extern RedriveSlot *redrive_slot_take(Oid database, Oid owner, bool foreground);
extern void redrive_slot_attach(RedriveSlot *slot);
extern void redrive_slot_free(RedriveSlot *slot);
extern int	redrive_count_executors(void);
extern RedriveDatabase *redrive_find_database(Oid database);
extern RedriveDatabase *redrive_enter_database(Oid database, bool make_room);

#endif							/* REDRIVE_SHMEM_H */
