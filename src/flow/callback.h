/*-------------------------------------------------------------------------
 *
 * callback.h
 *	  Callbacks that could not run where they arose.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_CALLBACK_H
#define REDRIVE_CALLBACK_H

#include "flow/batch.h"

extern bool redrive_run_due_callbacks(RedriveSlot *slot, Oid owner);

#endif							/* REDRIVE_CALLBACK_H */
